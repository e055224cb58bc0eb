# SPDX-License-Identifier: Apache-2.0
"""Rows that were a traceback, or were trained or dropped without a word."""

import json

import pytest

from moepeft import config as config_lib
from moepeft import peft
from moepeft.data.chat import formats as chat_formats
from moepeft.data.chat import render as chat_render
from moepeft.data.chat.messages import Turn
from moepeft.data.example import BadRow, BadRows
from moepeft.data.preference import formats as preference_formats
from moepeft.data.preference import rows as preference_rows
from moepeft.data.readers import jsonl_rows
from moepeft.data.text import documents
from moepeft.data.tokenizers.tokenizer import load_tokenizer
from moepeft.objectives import reference_model

USER = {'role': 'user', 'content': 'Why?'}
SO = {'role': 'assistant', 'content': 'So.'}
CALL = {'name': 'add', 'arguments': {}}


def messages(*turns, **more):
  return {'messages': [USER, *turns, SO]} | more


def calling(**call):
  return messages({'role': 'assistant', **call}, USER)


@pytest.mark.parametrize(
  ('row', 'said'),
  [
    (calling(tool_calls=[{'function': 'f'}]), 'turn 1 calls no tool'),
    (calling(tool_calls=[{'function': None}]), 'turn 1 calls no tool'),
    (calling(tool_calls=[{}]), 'turn 1 calls no tool'),
    (
      messages({'role': 'function_call', 'content': '[]'}, USER),
      'turn 1 calls no tool',
    ),
    (
      messages(SO, {'role': 'tool', 'content': '2'}),
      'turn 2 is of a tool, but the assistant called none',
    ),
    (
      {'instruction': 'Why?', 'output': 'So.', 'history': 5},
      "list of pairs in 'history', got 5",
    ),
    (
      {
        'system': 'B',
        'messages': [{'role': 'system', 'content': 'A'}, USER, SO],
      },
      "one system's text in 'system' and another",
    ),
  ],
  ids=range(7),
)
def test_a_row_that_says_two_things_or_none_is_refused(row, said):
  with pytest.raises(BadRow, match=said):
    chat_formats.parse_conversation(row)
  if 'messages' in row:
    pair = {'chosen': SO, 'rejected': {**SO, 'content': 'No.'}}
    fields = {**row, 'messages': row['messages'][:-1]}
    with pytest.raises(BadRow, match=said):
      preference_formats.parse_row(fields | pair)


def test_calls_that_are_written_as_text_may_be_answered_by_a_tool():
  said = {'role': 'assistant', 'content': f'<tool_call>{json.dumps(CALL)}'}
  row = messages(said, {'role': 'tool', 'content': '2'})
  assert len(chat_formats.parse_conversation(row).turns) == 4


def test_a_system_that_is_given_twice_alike_is_one():
  row = {'messages': [{'role': 'system', 'content': 'B'}, USER, SO]}
  actual = chat_formats.parse_conversation({**row, 'system': 'B'})
  assert [turn.role for turn in actual.turns] == ['system', 'user', 'assistant']


@pytest.mark.parametrize('kind', ['json', 'jsonl'])
def test_half_of_a_character_is_a_bad_row_wherever_it_stands(tmp_path, kind):
  # Emoji are two such halves and no harm.
  good = messages(tools=[{'name': 'add', 'description': '🚀'}])
  torn = messages(tools=[{'name': 'add', 'description': '\ud800'}])
  rows = list(map(json.dumps, [good, torn, good]))
  path = tmp_path / f'r.{kind}'
  text = f'[{",".join(rows)}]' if kind == 'json' else '\n'.join(rows)
  path.write_text(text)
  bad = BadRows('skip')
  assert len(list(chat_formats.read_rows(str(path), bad))) == 2
  (reason,) = bad.reasons
  where = 'row 1' if kind == 'json' else 'line 2'
  assert reason.startswith(f'{path}, {where}: half of a character')
  assert "'tools'" in reason


def test_half_of_a_character_in_text_is_a_bad_row(tmp_path):
  path = tmp_path / 'r.jsonl'
  rows = [{'text': 'good'}, {'text': 'abc\ud800def'}]
  path.write_text('\n'.join(map(json.dumps, rows)))
  with pytest.raises(ValueError, match="r.jsonl, line 2: half of .* 'text'"):
    documents.read_documents(str(path))
  actual, bad = documents.read_documents(str(path), 'skip')
  assert len(actual) == 1 and len(bad.reasons) == 1


def rows_of(path):
  data = config_lib.default().data
  data.path = str(path)
  return preference_rows.read_rows(
    data, BadRows('error'), False, lambda *row: row
  )


def test_a_bad_row_in_a_directory_of_preferences_is_told_by_file_and_line(
  tmp_path,
):
  good = {'prompt': 'Why?', 'chosen': 'So.', 'rejected': 'No.'}
  (tmp_path / 'a.json').write_text(json.dumps([good, good]))
  (tmp_path / 'b.jsonl').write_text(json.dumps(good))
  rows, _, places = rows_of(tmp_path)
  assert len(rows) == 3 and [row.idx for row in rows] == [0, 1, 2]
  assert places[-1] == f'{tmp_path}/b.jsonl, line 1'
  lines = [json.dumps(good), json.dumps({**good, 'chosen': ''})]
  (tmp_path / 'b.jsonl').write_text('\n'.join(lines))
  with pytest.raises(ValueError, match="b.jsonl, line 2: 'chosen' is empty"):
    rows_of(tmp_path)
  (tmp_path / 'b.jsonl').write_text('{"prompt": "x')
  with pytest.raises(ValueError, match='b.jsonl, line 1: not JSON'):
    rows_of(tmp_path)


def test_calls_and_tools_are_written_in_their_own_letters():
  call = {'name': 'get', 'arguments': {'city': 'Köln'}}
  tool = {'type': 'function', 'function': {'name': 'get', 'description': '天'}}
  talk = chat_formats.Conversation(
    (Turn('user', 'a'), Turn('assistant', '', [call])), [tool]
  )
  some, _ = chat_render.template_messages(talk, 'a template that knows neither')
  assert '"Köln"' in some[-1]['content'] and '"天"' in some[0]['content']


def read(path):
  return list(chat_formats.read_rows(str(path), BadRows('error')))


@pytest.mark.parametrize(
  ('value', 'said'),
  [
    ({'data': [messages()]}, "write the list in 'data' as the whole file"),
    (messages(), "write the list in 'messages'"),
    ({'instruction': 'a', 'output': 'b'}, r'put it into \[...\]'),
  ],
  ids=range(3),
)
def test_one_object_on_several_lines_is_told_as_such(tmp_path, value, said):
  path = tmp_path / 'r.json'
  path.write_text(json.dumps(value, indent=2))
  with pytest.raises(ValueError, match=f'one object on several .*{said}'):
    read(path)
  path.write_text(json.dumps([messages()], indent=2))
  assert len(read(path)) == 1


@pytest.mark.parametrize(
  ('reader', 'name'),
  [
    (read, 'b.json'),
    (documents.read_documents, 'b.txt'),
    (jsonl_rows.read, 'b.jsonl'),
  ],
)
def test_a_directory_that_is_named_as_a_file_is_told(tmp_path, reader, name):
  (tmp_path / name).mkdir()
  with pytest.raises(ValueError, match=f'{name} is a directory, expected'):
    reader(str(tmp_path))


def test_without_a_model_the_sentence_asks_for_one():
  with pytest.raises(ValueError, match='name a model, .*config file: model='):
    load_tokenizer('')


def test_a_reference_that_is_nowhere_is_asked_for_as_an_adapter():
  built = peft.Built(None, 'lora', 'peft', 'official')
  with pytest.raises(ValueError, match="='/nope' is no directory; name a run"):
    reference_model.make_reference('/nope', None, built, None)
