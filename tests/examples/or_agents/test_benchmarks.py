# SPDX-License-Identifier: Apache-2.0
"""Rows in the forms of public benchmarks."""

import json

import pytest

from examples.or_agents.benchmarks import Row, read_rows


def write_lines(path, *rows):
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return path


def test_rows_of_each_form_are_read(tmp_path):
  path = write_lines(
    tmp_path / 'rows.jsonl',
    {'en_question': 'Ducks?', 'en_answer': '1160.0', 'id': 3},
    {'id': 7, 'Question': 'Meals? ', 'Answer': '57', 'Type': 'easy_lp'},
    {'question': 'Pools?', 'answer': 'No Best Solution'},
    {'en_question': 'None?', 'en_answer': -99999},
    {'text': 'Tables?', 'value': 360},
    {'text': 'Nothing?', 'value': None},
  )
  assert read_rows(path) == [
    Row('3', 'Ducks?', 1160.0),
    Row('7', 'Meals?', 57.0),
    Row('line 3', 'Pools?', None),
    Row('line 4', 'None?', None),
    Row('line 5', 'Tables?', 360.0),
    Row('line 6', 'Nothing?', None),
  ]


def test_a_list_and_a_byte_order_mark_are_read(tmp_path):
  path = tmp_path / 'rows.json'
  rows = [{'question': '多少？', 'answer': 2}]
  path.write_text('\ufeff' + json.dumps(rows, indent=1))
  assert read_rows(path) == [Row('entry 1', '多少？', 2.0)]


def test_folders_of_complexor_are_read(tmp_path):
  for name, value in (('b', 700), ('a', 5)):
    folder = tmp_path / name
    folder.mkdir()
    (folder / 'description.txt').write_text(f'Problem {name}.\n')
    sample = {'input': {'demand': [1, 2]}, 'output': [value]}
    (folder / 'sample.json').write_text(json.dumps([sample]))
  assert read_rows(tmp_path) == [
    Row('a/1', 'Problem a.\n\nData: {"demand": [1, 2]}', 5.0),
    Row('b/1', 'Problem b.\n\nData: {"demand": [1, 2]}', 700.0),
  ]
  (tmp_path / 'a' / 'sample.json').write_text('[{"input": {}}]')
  with pytest.raises(ValueError, match='a/sample.json is no list of samples'):
    read_rows(tmp_path)


@pytest.mark.parametrize(
  'text, reason',
  [
    ('', 'is empty; name a file with rows of a benchmark'),
    ('[]', 'has no problem'),
    ('{"question": "x", "answer": 1}\n{', 'line 2 of .* is not JSON'),
    ('[{"document": "x"}]', 'entry 1 of .* no question and answer; expected'),
    ('{"question": "x", "answer": "many"}', "not a number: 'many'"),
    ('{"question": "x", "answer": "nan"}', "not a number: 'nan'"),
    ('7', 'line 1 of .* not a JSON object'),
  ],
)
def test_wrong_rows_are_refused(text, reason, tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(text)
  with pytest.raises(ValueError, match=reason):
    read_rows(path)
