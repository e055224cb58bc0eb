# SPDX-License-Identifier: Apache-2.0
"""A field that changes what a row means is used or refused, never dropped."""

import json

import pytest

from moepeft.data import example as example_lib
from moepeft.data.chat import formats as chat_formats
from moepeft.data.example import BadRows
from moepeft.data.preference import formats as preference_formats
from moepeft.data.readers import jsonl_rows
from moepeft.data.row_fields import BadRow, UnusedFields
from moepeft.data.text import documents
from moepeft.serve.http import text as http_text
from moepeft.serve.http.schemas import Message

from .. import chat_cases

USER = {'role': 'user', 'content': 'Why?'}
SO = {'role': 'assistant', 'content': 'So.'}
NO = {'role': 'assistant', 'content': 'No.'}
MESSAGES = {'messages': [USER, SO]}
SHAREGPT = {
  'conversations': [
    {'from': 'human', 'value': 'Why?'},
    {'from': 'gpt', 'value': 'So.'},
  ]
}
ALPACA = {'instruction': 'Why?', 'output': 'So.'}
COMPLETED = {'prompt': 'Why?', 'completion': 'So.'}
CHATS = (MESSAGES, SHAREGPT, ALPACA, COMPLETED)
PAIR = {'prompt': 'Why?', 'chosen': 'So.', 'rejected': 'No.'}
JUDGED = {'prompt': 'Why?', 'completion': 'So.', 'label': True}
P3 = {'inputs': 'Why?', 'targets': 'So.'}


def chat(row, unused=None):
  return chat_formats.parse_conversation(row, unused=unused)


def readers():
  """(reader, a good row) of every form."""
  yield from ((chat, row) for row in CHATS)
  yield from (
    (
      lambda row, unused=None: preference_formats.parse_row(row, unused=unused),
      good,
    )
    for good in (PAIR, JUDGED)
  )
  yield (
    lambda row, unused=None: example_lib.parse_example(row, 't', unused=unused),
    P3,
  )


# What no form reads.
REFUSED = {
  'images': ['a.jpg'],
  'image': 'a.jpg',
  'Image_Path': 'a.jpg',
  'video': 'a.mp4',
  'audios': ['a.wav'],
  'loss_mask': [0, 1],
  'mask': True,
  'train_detail': [{'begin_offset': 0, 'end_offset': 2, 'train': False}],
  'weight': 0.5,
  'loss': False,
  'documents': [{'text': 'D'}],
  'passage': 'C',
  'chat_template_kwargs': {'enable_thinking': False},
  'reasoning': 'since',
  'toolCalls': [{'name': 'f'}],
  'tool_choice': 'none',
  'input_ids': [1, 2],
}


@pytest.mark.parametrize('name', REFUSED)
def test_a_field_that_no_form_reads_is_refused_by_name(name):
  for read, good in readers():
    with pytest.raises(BadRow, match=f"the row has '{name}', which .*nothing"):
      read({**good, name: REFUSED[name]})
    # Without a value it says nothing.
    for empty in (None, '', [], {}):
      read({**good, name: empty})


def test_what_the_user_leaves_unused_is_listed_and_not_refused():
  for read, good in readers():
    unused = UnusedFields('images, Context')
    read({**good, 'images': ['a'], 'context': 'C', 'id': 7}, unused)
    assert unused.notes('f') == [
      'f: fields that nothing reads: images, context, id'
    ]


def test_metadata_is_listed_once_for_a_source(tmp_path):
  path = tmp_path / 'r.jsonl'
  row = {**P3, 'source': 'web', 'score': 3, 'weight': 1, 'loss': True}
  path.write_text('\n'.join([json.dumps(row)] * 3))
  assert jsonl_rows.read(str(path)).notes('r') == [
    f'{path}: fields that nothing reads: source, score, weight, loss'
  ]


def test_metadata_of_turns_is_listed():
  unused = UnusedFields()
  chat({'messages': [{**USER, 'timestamp': 3}, SO], 'id': 1}, unused)
  assert unused.notes('f') == [
    'f: fields that nothing reads: timestamp (of turns), id'
  ]


@pytest.mark.parametrize(
  'field',
  [
    {'images': ['a.jpg']},
    {'image_url': 'a.jpg'},
    {'mask': 1},
    {'loss_weight': 0.5},
    {'tools': [{'name': 'f'}]},
    {'channel': 'analysis'},
    {'refusal': 'I will not.'},
    {'prefix': True},
    {'Content': 'Other.'},
    {'text': 'Other.'},
    {'documents': ['D']},
    {'chain_of_thought': 'since'},
  ],
  ids=lambda field: next(iter(field)),
)
def test_a_turn_with_a_field_that_nothing_reads_is_refused(field):
  name = next(iter(field))
  for row in (
    {'messages': [USER, {**SO, **field}]},
    {'messages': [{**USER, **field}, SO]},
    {'prompt': [{**USER, **field}], 'completion': [SO]},
  ):
    with pytest.raises(BadRow, match=f"turn . has '{name}', which"):
      chat(row)
  with pytest.raises(BadRow, match=f"'chosen', turn 0 has '{name}', which"):
    preference_formats.parse_row({**PAIR, 'chosen': [{**SO, **field}]})


@pytest.mark.parametrize('key', ['weight', 'loss', 'train', 'training'])
@pytest.mark.parametrize('off', [0, False, 0.0])
def test_a_turn_that_is_marked_is_not_trained(key, off):
  row = {'messages': [USER, {**SO, key: off}, USER, {**SO, key: 1}]}
  trained = [t.trained for t in chat(row).turns if t.role == 'assistant']
  assert trained == [False, True]
  turns = [dict(turn) for turn in SHAREGPT['conversations']]
  turns[1][key] = off
  assert not chat({'conversations': turns}).turns[1].trained
  # A call of a tool, which is the assistant's too.
  call = {'from': 'function_call', 'value': '{"name": "f"}', key: off}
  actual = chat({'conversations': [turns[0], call, *turns]})
  assert not actual.turns[1].trained


@pytest.mark.parametrize('value', [0.5, 2, 'no', [0], float('nan')])
def test_a_mark_that_is_neither_is_refused(value):
  with pytest.raises(BadRow, match="turn 1 has the 'loss' .*; expected 0"):
    chat({'messages': [USER, {**SO, 'loss': value}]})


def test_two_marks_that_differ_are_refused():
  with pytest.raises(BadRow, match="one value in 'weight' and another in 'lo"):
    chat({'messages': [USER, {**SO, 'weight': 1, 'loss': 0}]})
  with pytest.raises(BadRow, match="in 'content' and another in 'value'"):
    chat({'messages': [USER, {**SO, 'value': 'Or.'}]})
  with pytest.raises(BadRow, match="in 'role' and another in 'from'"):
    chat({'messages': [USER, {**SO, 'from': 'human'}]})
  with pytest.raises(BadRow, match="in 'label' and another in 'kto_tag'"):
    preference_formats.parse_row({**JUDGED, 'kto_tag': False})


def test_a_legacy_call_is_a_call_of_a_tool():
  call = {'name': 'f', 'arguments': '{"x": 1}'}
  row = {
    'messages': [
      USER,
      {**SO, 'function_call': call},
      {'role': 'function', 'name': 'f', 'content': '2'},
      SO,
    ],
    'functions': [{'name': 'f'}],
  }
  actual = chat(row)
  assert actual.turns[1].calls == [{'name': 'f', 'arguments': {'x': 1}}]
  assert actual.turns[1].content == 'So.' and actual.turns[2].name == 'f'
  assert actual.tools == [{'type': 'function', 'function': {'name': 'f'}}]
  with pytest.raises(BadRow, match="in 'tools' and another in 'functions'"):
    chat({**row, 'tools': [{'name': 'g'}]})
  with pytest.raises(BadRow, match="turn 0 has 'function_call'"):
    chat({'messages': [{**USER, 'function_call': call}, SO]})


def test_a_request_is_read_as_the_row_that_was_trained():
  call = {'id': 'c1', 'function': {'name': 'f', 'arguments': '{"x": 1}'}}
  row = [
    {**USER, 'name': 'Ann'},
    {**SO, 'tool_calls': [call], 'reasoning_content': 'hm'},
    {'role': 'tool', 'tool_call_id': 'c1', 'content': '2'},
  ]
  sent = [http_text._to_turn(Message(**turn), i) for i, turn in enumerate(row)]
  assert sent == list(chat({'messages': row}).turns)


def test_ids_of_calls_are_kept():
  call = {'id': 'c1', 'function': {'name': 'f', 'arguments': '{}'}}
  result = {'role': 'tool', 'tool_call_id': 'c1', 'content': '2'}
  turns = chat(
    {'messages': [USER, {**SO, 'tool_calls': [call]}, result, SO]}
  ).turns
  assert turns[1].calls[0]['id'] == turns[2].call_id == 'c1'


@pytest.mark.parametrize('value', [0, 5, False, [], {}, ['a']])
def test_an_input_that_is_no_text_is_refused(value):
  for read, row in (
    (chat, ALPACA),
    (preference_formats.parse_row, ALPACA | {'label': True}),
  ):
    with pytest.raises(BadRow, match="'input' is .*, expected text"):
      read({**row, 'input': value})


@pytest.mark.parametrize('blank', ['', ' ', None])
def test_an_input_or_a_system_without_a_text_is_none(blank):
  assert len(chat({**ALPACA, 'input': blank, 'system': blank}).turns) == 2
  system = {'role': 'system', 'content': blank}
  assert chat({'messages': [system, USER, SO]}) == chat(MESSAGES)
  pair = {'prompt': [system, USER], 'chosen': [SO], 'rejected': [NO]}
  assert preference_formats.parse_row(pair) == preference_formats.parse_row(
    PAIR
  )
  with pytest.raises(BadRow, match='this one with the turn of nobody'):
    chat({'messages': [system]})


@pytest.mark.parametrize('key', ['system', 'system_prompt', 'system_message'])
def test_the_text_of_the_system_is_used_in_every_spelling(key):
  for row in CHATS:
    assert chat({**row, key: 'Be kind.'}).turns[0].content == 'Be kind.'
    with pytest.raises(BadRow, match=f"'{key}' is 0, expected text"):
      chat({**row, key: 0})
  assert (
    preference_formats.parse_row({**PAIR, key: 'Be kind.'})
    .prompt.turns[0]
    .content
  )


def test_prompts_and_completions_are_conversations():
  assert chat(COMPLETED) == chat(MESSAGES)
  actual = chat({'prompt': [USER, SO, USER], 'completion': [SO]})
  # As TRL's completion_only_loss: the prompt's answers are not trained.
  assert [t.trained for t in actual.turns] == [True, False, True, True]
  with pytest.raises(BadRow, match="the row has 'prompt', which is text"):
    chat(MESSAGES | {'prompt': 'Who?', 'completion': 'He.'})
  # What only repeats the row loses nothing, as UltraChat's prompt.
  assert chat(MESSAGES | {'prompt': 'Why? '}) == chat(MESSAGES)


@pytest.mark.parametrize('name', ['chosen', 'rejected', 'kto_tag', 'label'])
def test_compared_and_judged_answers_are_no_conversations(name):
  value = False if name in ('kto_tag', 'label') else 'No.'
  with pytest.raises(BadRow, match=f"the row has '{name}'"):
    chat({**MESSAGES, name: value})


def test_a_part_of_another_kind_is_refused_whatever_its_text():
  part = {'type': 'image_url', 'text': 'a cat'}
  for odd in (part, {'type': 'text', 'text': 'a', 'image': 'b'}, 3, None):
    with pytest.raises(BadRow, match="only text can be trained|'image'"):
      chat({'messages': [{'role': 'user', 'content': [odd]}, SO]})


@pytest.mark.parametrize(
  'row',
  [
    {'prompt': 'Why?', 'chosen': [USER, SO], 'rejected': [USER, NO]}
    | {'messages': [USER, SO]},
    {'prompt': [USER], 'chosen': [USER, SO], 'rejected': [USER, NO]},
    {'prompt': ' Why?\n', 'chosen': [USER, SO], 'rejected': [USER, NO]},
    {'messages': [USER, SO], 'chosen': [USER, SO], 'rejected': [USER, NO]},
  ],
  ids=range(4),
)
def test_a_prompt_that_is_given_twice_is_there_once(row):
  actual = preference_formats.parse_row(row)
  assert [turn.role for turn in actual.prompt.turns] == ['user']
  assert (actual.chosen.content, actual.rejected.content) == ('So.', 'No.')


def test_a_prompt_that_begins_its_answers_lists_is_there_once():
  more = [USER, SO, {'role': 'user', 'content': 'And?'}]
  row = {'prompt': 'Why?', 'chosen': [*more, SO], 'rejected': [*more, NO]}
  assert len(preference_formats.parse_row(row).prompt.turns) == 3
  assert (
    len(preference_formats.parse_row({**row, 'prompt': 'And?'}).prompt.turns)
    == 3
  )
  # A prompt of more turns than the lists repeat, too.
  row = {'prompt': more, 'chosen': [more[-1], SO], 'rejected': [more[-1], NO]}
  assert len(preference_formats.parse_row(row).prompt.turns) == 3


@pytest.mark.parametrize(
  'row',
  [
    {'prompt': 'Who?', 'chosen': [USER, SO], 'rejected': [USER, NO]},
    {'prompt': [USER, SO, {'role': 'user', 'content': 'And?'}]}
    | {'chosen': [USER, SO], 'rejected': [USER, NO]},
  ],
  ids=range(2),
)
def test_prompts_whose_order_nothing_tells_are_refused(row):
  with pytest.raises(BadRow, match='nothing tells which come first'):
    preference_formats.parse_row(row)


def test_a_pair_beside_other_messages_is_refused():
  row = {**PAIR, 'messages': [{'role': 'user', 'content': 'Else?'}, SO]}
  with pytest.raises(BadRow, match="the row has 'messages', which is text"):
    preference_formats.parse_row(row)


def test_placeholders_of_images_are_told(tmp_path):
  path = tmp_path / 'r.jsonl'
  turns = [{'role': 'user', 'content': '<image>\nWho?'}, SO]
  path.write_text(json.dumps({'messages': turns}))
  bad = BadRows()
  for _, _, row in chat_formats.read_rows(str(path), bad):
    chat(row, bad.unused)
  (line,) = bad.notes('f')
  assert line.startswith('f: <image> stands in its texts and is trained as tex')


@pytest.mark.parametrize('kind', ['jsonl', 'json'])
def test_a_field_that_stands_twice_is_refused(tmp_path, kind):
  path = tmp_path / f'r.{kind}'
  text = '{"instruction": "a", "output": "b", "output": "c"}'
  path.write_text(text if kind == 'jsonl' else f'[{text}]')
  with pytest.raises(ValueError, match="an object has the key 'output' twice"):
    chat_cases.read_conversations(str(path))


def test_fields_of_plain_text_are_refused_or_listed(tmp_path):
  path = tmp_path / 't.jsonl'
  path.write_text(json.dumps({'text': '\ufeffOnce.', 'url': 'u'}))
  (document,), bad = documents.read_documents(str(path))
  assert document.passages == ('Once.',)
  assert bad.notes('t') == ['t: fields that nothing reads: url']
  path.write_text(json.dumps({'text': 'Once.', 'images': ['a']}))
  with pytest.raises(ValueError, match="line 1: the row has 'images'"):
    documents.read_documents(str(path))


@pytest.mark.parametrize(
  'name', ['id', 'source', 'score', 'category', 'url', 'lang', 'title', 'name']
)
def test_metadata_is_metadata(name):
  for read, good in readers():
    read({**good, name: 'x'})


@pytest.mark.parametrize('idx', [2**63, -(2**63) - 1, 18011072989319135231])
def test_an_idx_that_no_array_holds_is_refused(idx):
  with pytest.raises(BadRow, match="integer of 64 bits in 'idx', got"):
    example_lib.parse_example({**P3, 'idx': idx}, 't')
