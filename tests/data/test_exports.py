# SPDX-License-Identifier: Apache-2.0
"""Rows as other programs export them: read whole, or refused by name."""

import pytest
from ml_collections import ConfigDict

from moepeft.data.chat import formats as chat_formats
from moepeft.data.example import BadRows
from moepeft.data.preference import formats as preference_formats
from moepeft.data.preference import rows as preference_rows
from moepeft.data.readers import csv_table
from moepeft.data.row_fields import BadRow, UnusedFields

USER = {'role': 'user', 'content': 'Why is it so?'}
SO = {'role': 'assistant', 'content': 'So.'}
NO = {'role': 'assistant', 'content': 'No.'}
PAIR = {'prompt': 'Why is it so?', 'chosen': 'So.', 'rejected': 'No.'}


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    *((name, False) for name in ('is_train', 'train_on_turn', 'should_train')),
    *((name, False) for name in ('compute_loss', 'calculate_loss')),
    *((name, False) for name in ('is_target', 'supervise', 'trainable')),
    *((name, True) for name in ('ignore', 'no_loss', 'skip', 'masked')),
    ('token_weights', [0, 1]),
    ('train_on_inputs', True),
  ],
)
def test_a_mark_of_any_spelling_is_refused_where_it_holds_a_turn_back(
  name, value
):
  row = {'messages': [USER, {**SO, name: value}, USER, SO]}
  with pytest.raises(BadRow, match=f"'{name}', which marks what is trained"):
    chat_formats.parse_conversation(row)
  if isinstance(value, bool):
    # Its opposite is how every turn is.
    row['messages'][1][name] = not value
    assert all(t.trained for t in chat_formats.parse_conversation(row).turns)


@pytest.mark.parametrize(
  'name',
  ['rejected_images', 'user_audio', 'image_1', 'screenshots', 'video_url']
  + ['Complex_CoT', 'thinking_content', 'reasoning_trace']
  + ['rejected_messages'],
)
def test_media_and_thoughts_of_any_spelling_are_refused(name):
  for value in ('a', ['a']):
    with pytest.raises(BadRow, match=f"the row has '{name}', which"):
      chat_formats.parse_conversation({'messages': [USER, SO], name: value})


@pytest.mark.parametrize(
  'name',
  ['social_media', 'trainer', 'source', 'id', 'score_chosen', 'answer']
  + ['losses_of_rows_that_were_left_out', 'constraint', 'num_turns'],
)
def test_metadata_is_no_mark(name):
  unused = UnusedFields()
  chat_formats.parse_conversation(
    {'messages': [USER, SO], name: 7}, unused=unused
  )
  assert unused.notes('f') == [f'f: fields that nothing reads: {name}']


def test_lists_and_objects_of_nulls_say_nothing():
  row = {
    'messages': [USER, SO],
    'images': [None],
    'chat_template_kwargs': {'enable_thinking': None, 'python_tools': []},
  }
  assert len(chat_formats.parse_conversation(row).turns) == 2
  row['chat_template_kwargs']['enable_thinking'] = False
  with pytest.raises(BadRow, match="'chat_template_kwargs', which"):
    chat_formats.parse_conversation(row)


def test_the_text_of_an_alpaca_row_only_repeats_it():
  row = {'instruction': 'Sum it up.', 'input': 'A long\nstory.', 'output': 'S.'}
  told = 'Below is an instruction.\n\n### Instruction:\nSum it up.\n\n'
  text = f'{told}### Input:\nA long\nstory.\n\n### Response:\nS.'
  unused = UnusedFields()
  chat_formats.parse_conversation({**row, 'text': text}, unused=unused)
  assert unused.notes('f') == ['f: fields that nothing reads: text']
  with pytest.raises(BadRow, match="'text', which is text"):
    chat_formats.parse_conversation({**row, 'text': 'Sum it up. S.'})


def test_roles_of_other_programs_are_read():
  call = {'role': 'tool_call', 'content': '{"name": "f", "arguments": {}}'}
  result = {'role': 'tool_response', 'content': '2'}
  row = {'messages': [USER, call, result, {**SO, 'role': 'model'}]}
  actual = chat_formats.parse_conversation(row).turns
  assert [t.role for t in actual] == ['user', 'assistant', 'tool', 'assistant']
  assert actual[1].calls == [{'name': 'f', 'arguments': {}}]


@pytest.mark.parametrize('before', ['', '\n\n'])
def test_answers_that_begin_with_the_whole_prompt_are_refused(before):
  asked = PAIR['prompt']
  whole = {k: f'{before}{asked} {PAIR[k]}' for k in ('chosen', 'rejected')}
  for prompt in (asked, f'{before}{asked}', [USER]):
    with pytest.raises(BadRow, match='begin with the whole prompt, .* twice'):
      preference_formats.parse_row({'prompt': prompt, **whole})
  # One answer may repeat a question, and a greeting is answered by one.
  preference_formats.parse_row({**PAIR, 'chosen': whole['chosen']})
  preference_formats.parse_row(
    {'prompt': 'Hi', 'chosen': 'Hi!', 'rejected': 'Hi there.'}
  )


def test_an_answer_to_compare_or_judge_that_is_not_trained_is_refused():
  off = {**SO, 'weight': 0}
  for row in (
    {'prompt': [USER], 'chosen': [off], 'rejected': [NO]},
    {'prompt': [USER], 'chosen': [NO], 'rejected': [off]},
    {'messages': [USER, off], 'label': True},
  ):
    with pytest.raises(BadRow, match='an answer is marked as not trained'):
      preference_formats.parse_row(row)
  # Of the turns before it nothing is trained in any case.
  preference_formats.parse_row(
    {'messages': [USER, off, USER, SO], 'label': True}
  )


def test_nulls_that_a_table_fills_in_are_not_in_the_prompt(tmp_path):
  parquet = pytest.importorskip('pyarrow.parquet')
  arrow = pytest.importorskip('pyarrow')
  tools = [
    {'name': 'f', 'parameters': {'properties': {'x': {'type': 'string'}}}},
    {'name': 'g', 'parameters': {'properties': {'y': {'type': 'number'}}}},
  ]
  path = str(tmp_path / 'pairs.parquet')
  rows = [{**PAIR, 'tools': [tool]} for tool in tools]
  parquet.write_table(arrow.Table.from_pylist(rows), path)
  data = ConfigDict(
    {'path': path, 'split': 'train', 'format': '', 'system_prompt': ''}
  )
  good, _, _ = preference_rows.read_rows(
    data, BadRows(), False, lambda *_: None
  )
  read = [row.prompt.tools[0]['function'] for row in good]
  assert read == tools


def test_dollys_and_orcas_names_are_read():
  talk = chat_formats.parse_conversation(
    {'instruction': 'Sum up.', 'context': 'Text.', 'response': 'T.'}
  )
  assert [t.content for t in talk.turns] == ['Sum up.\nText.', 'T.']
  talk = chat_formats.parse_conversation({'prompt': 'Why?', 'response': 'So.'})
  assert [t.content for t in talk.turns] == ['Why?', 'So.']
  # Intel/orca_dpo_pairs.
  row = {'system': 'S', 'question': 'Why?', 'chosen': 'So.', 'rejected': 'No.'}
  pair = preference_formats.parse_row(row)
  assert [t.content for t in pair.prompt.turns] == ['S', 'Why?']
  with pytest.raises(BadRow, match="'question', which is text"):
    preference_formats.parse_row({**row, 'prompt': 'How?'})
  with pytest.raises(BadRow, match="one value in 'output' and another in"):
    chat_formats.parse_conversation(
      {'instruction': 'a', 'output': 'b', 'response': 'c'}
    )


def test_a_tool_may_have_nothing_to_tell():
  call = {'function': {'name': 'save', 'arguments': '{}'}}
  turns = [
    USER,
    {'role': 'assistant', 'content': None, 'tool_calls': [call]},
    {'role': 'tool', 'content': ''},
    SO,
  ]
  talk = chat_formats.parse_conversation({'messages': turns})
  assert [t.content for t in talk.turns] == [USER['content'], '', '', 'So.']


def test_an_ignored_field_is_unused_where_it_would_be_read_too():
  turns = [{**USER, 'name': 'Ada'}, SO]
  unused = UnusedFields('name')
  talk = chat_formats.parse_conversation({'messages': turns}, unused=unused)
  assert [t.name for t in talk.turns] == ['', '']
  assert unused.notes('f') == ['f: fields that nothing reads: name (of turns)']
  talk = chat_formats.parse_conversation({'messages': turns})
  assert talk.turns[0].name == 'Ada'


@pytest.mark.parametrize('label', [True, 'True', 'true', ' TRUE'])
def test_a_label_may_be_a_tables_text(label):
  row = {'prompt': 'Why?', 'completion': 'So.', 'label': label}
  assert preference_formats.parse_row(row).label is True
  for wrong in ('yes', '1', 1):
    with pytest.raises(BadRow, match='expected true or false'):
      preference_formats.parse_row({**row, 'label': wrong})


def test_empty_cells_after_the_last_column_are_no_columns(tmp_path):
  file = tmp_path / 'a.csv'
  file.write_text('inputs,targets,,\na,b,,\nc,d\n')
  _, table = csv_table.read(str(file), BadRows())
  assert list(table) == [
    {'inputs': 'a', 'targets': 'b'},
    {'inputs': 'c', 'targets': 'd'},
  ]
  file.write_text('inputs,targets,,\na,b,,x\n')
  with pytest.raises(ValueError, match='4 cells, and the header has 2'):
    csv_table.read(str(file), BadRows())
