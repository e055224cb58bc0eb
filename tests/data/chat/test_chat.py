# SPDX-License-Identifier: Apache-2.0
"""Conversations: forms, templates, what is trained, what is too long."""

import gzip
import itertools
import json

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat import formats as chat_formats
from moepeft.data.chat import render as chat_render
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.example import BadRow
from moepeft.data.sources import open_data
from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
)
from tests import ROOT

from ... import chat_cases

SHARED = ROOT.parent / 'shared'
TALK = Conversation(
  (
    Turn('system', 'be kind'),
    Turn('user', 'hi'),
    Turn('assistant', 'hello'),
    Turn('user', 'and you?'),
    Turn('assistant', ' fine.'),
  )
)


@pytest.fixture(scope='module')
def tokenizer():
  return chat_cases.tokenizer()


@pytest.fixture(scope='module')
def saved(tokenizer, tmp_path_factory):
  path = str(tmp_path_factory.mktemp('tokenizer'))
  tokenizer.save_pretrained(path)
  return path


def render(talk, tokenizer, train_on='answers', template=''):
  return chat_dataset.ChatTemplate(tokenizer, template, train_on).encode(talk)


def trained(sample, tokenizer):
  """The text with what is trained in brackets."""
  parts = []
  for own, group in itertools.groupby(
    zip(sample.ids.tolist(), sample.loss_mask, strict=True), lambda x: x[1]
  ):
    text = tokenizer.decode([i for i, _ in group])
    parts.append(f'[{text}]' if own else text)
  return ''.join(parts)


SHOWN = (
  '<|im_start|>system\nbe kind<|im_end|>\n'
  '<|im_start|>user\nhi<|im_end|>\n'
  '<|im_start|>assistant\n[hello<|im_end|>]\n'
  '<|im_start|>user\nand you?<|im_end|>\n'
  '<|im_start|>assistant\n[ fine.<|im_end|>]\n'
)


@pytest.mark.parametrize('name', ['CHATML', 'MARKED', 'REWRITING'])
def test_answers_and_their_ends_are_trained_and_nothing_else(tokenizer, name):
  template = getattr(chat_cases, name)
  actual = render(TALK, tokenizer, template=template)
  expected = SHOWN
  if name == 'REWRITING':
    expected = SHOWN.replace('[ fine', '[<think></think> fine')
  assert trained(actual, tokenizer) == expected


def test_ids_are_those_of_the_template(tokenizer):
  actual = render(TALK, tokenizer)
  some, _ = chat_render.template_messages(TALK, chat_cases.CHATML)
  own = tokenizer.apply_chat_template(some, return_dict=False)
  assert actual.ids.tolist() == own
  whole = render(TALK, tokenizer, 'all')
  assert whole.ids.tolist() == own and whole.loss_mask.all()


def test_a_template_that_hides_its_answers_is_refused(tokenizer):
  # Answers in capitals: what is rendered alone is nowhere in the whole.
  template = chat_cases.REWRITING.replace(
    "{{ m['content'] }}",
    "{{ m['content'] if loop.last else m['content'] | upper }}",
  )
  with pytest.raises(BadRow, match="'{% generation %}'"):
    render(TALK, tokenizer, template=template)


def test_calls_and_tools_are_rendered_where_a_template_has_no_word(tokenizer):
  tool = {'type': 'function', 'function': {'name': 'add', 'parameters': {}}}
  call = {'name': 'add', 'arguments': {'x': 1}}
  talk = Conversation(
    (
      Turn('user', 'one and one?'),
      Turn('assistant', '', [call]),
      Turn('tool', '2'),
      Turn('assistant', 'two'),
    ),
    [tool],
  )
  shown = trained(render(talk, tokenizer), tokenizer)
  assert '{"name": "add", "parameters": {}}' in shown
  assert (
    '[<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call><|im_end|>]'
    in shown
  )
  assert '<|im_start|>tool\n2<|im_end|>' in shown and '[two<|im_end|>]' in shown
  knows = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{{ m['tool_calls'] | tojson if m['tool_calls'] }}<|im_end|>{% endfor %}"
    '{{ tools | tojson }}'
    '{% if add_generation_prompt %}assistant:{% endif %}'
  )
  some, tools = chat_render.template_messages(talk, knows)
  assert tools == [tool] and some[1]['tool_calls'][0]['function'] == call


ALPACA = {'instruction': 'add', 'input': '1 1', 'output': '2'}
SHAREGPT = {
  'conversations': [
    {'from': 'human', 'value': 'add 1 1'},
    {
      'from': 'function_call',
      'value': '{"name": "add", "arguments": {"x": 1}}',
    },
    {'from': 'observation', 'value': '2'},
    {'from': 'gpt', 'value': 'two'},
  ],
  'tools': '[{"name": "add"}]',
  'system': 'be kind',
}
MESSAGES = {
  'messages': [
    {'role': 'user', 'content': [{'type': 'text', 'text': 'add 1 1'}]},
    {
      'role': 'assistant',
      'content': None,
      'tool_calls': [
        {'type': 'function', 'function': {'name': 'add', 'arguments': '{}'}}
      ],
    },
    {'role': 'tool', 'content': '2'},
    {'role': 'assistant', 'content': 'two'},
  ]
}


def roles(talk):
  return [turn.role for turn in talk.turns]


def test_each_form_is_found_and_read():
  talk = chat_formats.parse_conversation({**ALPACA, 'history': [['a', 'b']]})
  assert [t.content for t in talk.turns] == ['a', 'b', 'add\n1 1', '2']
  assert roles(talk) == ['user', 'assistant'] * 2
  talk = chat_formats.parse_conversation(SHAREGPT)
  assert roles(talk) == ['system', 'user', 'assistant', 'tool', 'assistant']
  assert talk.turns[2].calls == [{'name': 'add', 'arguments': {'x': 1}}]
  assert talk.tools == [{'type': 'function', 'function': {'name': 'add'}}]
  talk = chat_formats.parse_conversation(MESSAGES)
  assert roles(talk) == ['user', 'assistant', 'tool', 'assistant']
  assert talk.turns[1] == Turn(
    'assistant', '', [{'name': 'add', 'arguments': {}}]
  )


def test_weights_and_thoughts_of_turns_are_read():
  row = {
    'messages': [
      {'role': 'user', 'content': 'a', 'weight': 0},
      {'role': 'assistant', 'content': 'b', 'weight': 0},
      {'role': 'user', 'content': 'c'},
      {'role': 'assistant', 'content': 'd', 'weight': 1, 'thinking': 'hm'},
    ]
  }
  turns = chat_formats.parse_conversation(row).turns
  assert [turn.trained for turn in turns] == [True, False, True, True]
  assert turns[3].thought == 'hm'


def with_turn(row, field, place, **changes):
  turns = [dict(turn) for turn in row[field]]
  turns[place].update(changes)
  turns[place] = {k: v for k, v in turns[place].items() if v != 'GONE'}
  return {**row, field: turns}


@pytest.mark.parametrize(
  ('row', 'said'),
  [
    ({'text': 'x'}, "the row has 'text'; expected 'messages'"),
    ({**ALPACA, 'output': ' '}, "'output' is empty"),
    ({**ALPACA, 'output': None}, "'output' is None, expected text"),
    ({**ALPACA, 'history': [['a']]}, "expected pairs of texts in 'history'"),
    ({'conversations': []}, "expected a list of turns in 'conversations'"),
    (
      with_turn(SHAREGPT, 'conversations', 3, value=''),
      r'turn 3 \(assistant\) is empty',
    ),
    (
      with_turn(SHAREGPT, 'conversations', 0, **{'from': 'GONE'}),
      'turn 0 has the role None; expected one of system',
    ),
    (
      with_turn(SHAREGPT, 'conversations', 1, value='add(1)'),
      'turn 1 holds no JSON of a call of a tool',
    ),
    ({**SHAREGPT, 'tools': 'add'}, "'tools' holds no JSON"),
    (
      with_turn(MESSAGES, 'messages', 0, role='bot'),
      "turn 0 has the role 'bot'",
    ),
    (
      with_turn(MESSAGES, 'messages', 0, role='assistant'),
      "a conversation begins with the user's turn",
    ),
    (
      with_turn(MESSAGES, 'messages', 3, role='user'),
      "the last turn is the user's, expected an answer",
    ),
    (
      with_turn(MESSAGES, 'messages', 0, content=[{'type': 'image_url'}]),
      'only text can be trained',
    ),
    (
      with_turn(
        MESSAGES, 'messages', 1, role='user', content='x', tool_calls='GONE'
      ),
      'turn 2 is of a tool and follows the user',
    ),
    (
      with_turn(MESSAGES, 'messages', 3, weight=0.5),
      "turn 3 has the 'weight' 0.5; expected 0",
    ),
    (
      with_turn(MESSAGES, 'messages', 0, weight=1),
      "turn 0 has the 'weight' 1, but the turn of the user is not trained",
    ),
    (
      with_turn(MESSAGES, 'messages', 3, reasoning_content=['hm']),
      "turn 3, 'reasoning_content' is .'hm'., expected text",
    ),
    (
      with_turn(MESSAGES, 'messages', 0, thinking='hm'),
      "turn 0 has 'thinking', which only the assistant has",
    ),
  ],
  ids=range(18),
)
def test_what_is_wrong_with_a_row_is_one_sentence(row, said, tmp_path):
  path = tmp_path / 'rows.json'
  path.write_text(json.dumps([ALPACA, row]))
  with pytest.raises(ValueError, match=f'rows.json, row 1: .*{said}') as e:
    chat_cases.read_conversations(str(path))
  assert '\n' not in str(e.value)


def test_a_broken_line_is_told_with_its_number(tmp_path):
  path = tmp_path / 'rows.jsonl.gz'
  path.write_bytes(gzip.compress(f'{json.dumps(ALPACA)}\n{{"a": '.encode()))
  with pytest.raises(ValueError, match='rows.jsonl.gz, line 2: not JSON'):
    chat_cases.read_conversations(str(path))


def test_a_form_that_is_named_is_the_one_that_is_read(tmp_path):
  (tmp_path / 'rows.json').write_text(json.dumps([ALPACA]))
  path = str(tmp_path / 'rows.json')
  with pytest.raises(ValueError, match="a list of turns in 'messages'"):
    chat_cases.read_conversations(path, 'messages')
  with pytest.raises(ValueError, match='config.data.format is one of alpaca'):
    chat_cases.read_conversations(path, 'chatml')


def data(path, saved, **changes):
  c = config_lib.default().data
  c.source, c.path, c.tokenizer, c.validation_fraction = (
    'chat',
    path,
    saved,
    0.0,
  )
  c.update(changes)
  return c


def written(tmp_path, *rows):
  (tmp_path / 'rows.json').write_text(json.dumps(rows))
  return str(tmp_path / 'rows.json')


# 22 bytes and 4 special tokens of the user's turn, 12 more of the answer's.
LONG = {
  'messages': [
    {'role': 'system', 'content': 'S'},
    {'role': 'user', 'content': 'old'},
    {'role': 'assistant', 'content': 'gone'},
    {'role': 'user', 'content': 'a question without an end'},
    {'role': 'assistant', 'content': 'yes'},
  ]
}


def opened(path, saved, **changes):
  config = data(path, saved, **changes)
  words = HuggingFaceTokenizer(saved)
  form = CausalCollator(words, config.length, config.truncation)
  return open_data(config, 0, collator=form), words.tokenizer


@pytest.mark.parametrize(
  ('length', 'kept'),
  [
    # Without the oldest exchange: 11 + 34 + 17 ids, one more than are fed.
    (62, 'a question without an end'),
    (45, 'out an end'),
  ],
)
def test_a_long_prompt_loses_its_oldest_and_the_answer_stays(
  tmp_path, saved, length, kept
):
  actual, tokenizer = opened(written(tmp_path, LONG), saved, length=length)
  shown = trained(actual.train[0], tokenizer)
  assert shown.startswith('<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n')
  assert f'{kept}<|im_end|>' in shown and 'gone' not in shown
  assert shown.endswith('<|im_start|>assistant\n[yes<|im_end|>]\n')
  assert '1 conversations are longer' in actual.notes[-1]
  assert len(actual.train[0].ids) <= length + 1


def test_too_long_may_cut_the_end_or_drop(tmp_path, saved):
  path = written(tmp_path, LONG, ALPACA)
  actual, tokenizer = opened(path, saved, length=60, truncation='end')
  shown = (
    trained(actual.train[0], tokenizer),
    trained(actual.train[1], tokenizer),
  )
  assert any('[gone<|im_end|>]' in one for one in shown)
  actual, _ = opened(path, saved, length=60, truncation='drop')
  assert '1 conversations are dropped' in actual.notes[-1]
  assert actual.train[0].ids.tolist() == actual.train[1].ids.tolist()
  with pytest.raises(ValueError, match='leaves no conversation to train on'):
    opened(written(tmp_path, LONG), saved, length=60, truncation='drop')


def test_reading_that_takes_long_tells_how_far_it_is(
  tmp_path, saved, monkeypatch, capsys
):
  path = written(tmp_path, ALPACA, LONG)
  opened(path, saved)
  assert capsys.readouterr().err == ''
  monkeypatch.setattr(chat_dataset, '_PROGRESS_INTERVAL', -1.0)
  opened(path, saved)
  assert f'{path}: 1 rows read' in capsys.readouterr().err


def test_a_system_prompt_is_put_where_there_is_none(tmp_path, saved):
  rows = written(tmp_path, ALPACA, LONG)
  actual, tokenizer = opened(rows, saved, system_prompt='be kind')
  shown = {trained(actual.train[i], tokenizer)[:25] for i in range(2)}
  assert shown == {'<|im_start|>system\nbe kin', '<|im_start|>system\nS<|im_'}


def test_bad_rows_are_errors_or_skipped_and_told(tmp_path, saved):
  path = written(tmp_path, ALPACA, {**ALPACA, 'output': ''})
  with pytest.raises(ValueError, match="row 1: 'output' is empty"):
    opened(path, saved)
  actual, _ = opened(path, saved, on_bad_row='skip')
  assert 'skipped 1 bad rows' in actual.notes[1]


def test_a_template_that_trains_nothing_is_told(tmp_path, saved):
  file = tmp_path / 'template.jinja'
  file.write_text(
    chat_cases.MARKED.replace('{% generation %}', '').replace(
      '{% endgeneration %}', '{% generation %}{% endgeneration %}'
    )
  )
  path = written(tmp_path, ALPACA)
  with pytest.raises(ValueError, match='row 0: the row has no trained token'):
    opened(path, saved, chat_template=str(file))


def test_chat_needs_a_tokenizer_with_a_template(tmp_path, tokenizer):
  config = data(written(tmp_path, ALPACA), 'bytes')
  with pytest.raises(ValueError, match='need a tokenizer with a chat template'):
    open_data(config, 0, collator=CausalCollator(ByteTokenizer(), 64))
  bare = chat_cases.tokenizer(None)
  with pytest.raises(ValueError, match='has no chat template'):
    chat_dataset.ChatTemplate(bare)
  with pytest.raises(ValueError, match='answers, all'):
    chat_dataset.ChatTemplate(tokenizer, train_on='prompt')


def test_a_row_that_a_template_refuses_is_told(tmp_path, saved):
  file = tmp_path / 'template.jinja'
  file.write_text("{{ raise_exception('no system here') }}")
  path = written(tmp_path, ALPACA)
  with pytest.raises(ValueError, match='row 0: the chat .*no system here'):
    opened(path, saved, chat_template=str(file))


REAL = pytest.mark.skipif(
  not (SHARED / 'models' / 'smollm2-tokenizer').exists(),
  reason='needs the shared data',
)


@REAL
@pytest.mark.parametrize(
  ('name', 'count'),
  [
    ('alpaca_en_demo.json', 999),
    ('alpaca_zh_demo.json', 1000),
    ('glaive_toolcall_en_demo.json', 300),
  ],
)
def test_real_conversations_are_read_and_every_answer_is_found(name, count):
  words = HuggingFaceTokenizer(str(SHARED / 'models' / 'smollm2-tokenizer'))
  path = str(SHARED / 'data' / 'sft' / name)
  talks = chat_cases.read_conversations(path)
  assert len(talks) == count
  for talk in talks[::23]:
    shown = render(talk, words.tokenizer)
    runs = np.diff(np.concatenate([[0], shown.loss_mask.astype(int)]))
    answers = sum(turn.role == 'assistant' for turn in talk.turns)
    assert (runs == 1).sum() == answers
    # Each is trained up to its end of turn, and nothing is after it.
    last = shown.ids[np.flatnonzero(np.append(np.diff(shown.loss_mask), True))]
    assert words.eos in last.tolist()
