# SPDX-License-Identifier: Apache-2.0
"""Rows on disk: what is written is read, and nothing else is."""

import json
import os

import pytest

from moepeft.evaluation import results

from .cases import row

ROWS = [
  row('a', 'GPT-3 “style”', [1, 0, 1], idx=[3, 17, 5], cut=1, chance=1 / 3),
  row('b', '', [2.5, 1.25], metric='loss', weights=[2, 3], majority=None),
  row('c', 'x', None, [0, 1], None, metric='bleu', value=31.0),
]


def test_rows_are_read_as_they_were_written(tmp_path):
  path = tmp_path / 'evaluation.jsonl'
  results.write(path, ROWS)
  assert results.read(path) == ROWS
  first = json.loads(path.read_text().splitlines()[0])
  assert (first['value'], first['examples']) == (pytest.approx(2 / 3), 3)
  assert (first['idx'], first['each']) == ([3, 17, 5], [1, 0, 1])
  assert first['weights'] == [1, 1, 1]
  assert first['run'] == 'runs/a' and first['parameters'] == 7


def test_rows_of_before_their_data_was_told_are_read(tmp_path):
  path = tmp_path / 'rows.jsonl'
  results.write(path, ROWS[:1])
  old = json.loads(path.read_text())
  for key in ('data_sha', 'inputs_length', 'targets_length', 'checkpoint'):
    del old[key]
  path.write_text(json.dumps(old) + '\n')
  (actual,) = results.read(path)
  assert (actual.data_sha, actual.inputs_length) == (None, None)
  assert actual == ROWS[0]


def test_results_of_version_0_1_are_read(tmp_path):
  path = tmp_path / 'rows.jsonl'
  results.write(path, ROWS)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  # It called a metric a measure.
  old = [line | {'measure': line.pop('metric')} for line in lines]
  assert all('metric' not in line for line in old)
  path.write_text(''.join(json.dumps(line) + '\n' for line in old))
  assert results.read(path) == ROWS


def test_a_value_is_the_figures_over_the_weights():
  assert ROWS[1].value == pytest.approx(3.75 / 5)
  assert ROWS[2].low is None and ROWS[2].high is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'evaluation.jsonl'
  results.write(path, ROWS)
  before = path.read_bytes()

  def full(*_):
    raise OSError('No space left on device')

  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(OSError, match='No space'):
    results.write(path, ROWS[:1])
  assert path.read_bytes() == before
  assert os.listdir(tmp_path) == ['evaluation.jsonl']


def test_a_value_that_is_no_number_is_refused():
  with pytest.raises(ValueError, match="loss of 'b', prompt 'x', is nan"):
    row('b', 'x', [float('nan'), 1], metric='loss', weights=[1, 1])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'task': None}, "expected text in 'task', got None"),
    ({'seed': 0.5}, "expected a whole number in 'seed', got 0.5"),
    ({'value': None}, "expected a number in 'value', got None"),
    ({'low': 'x'}, "expected a number in 'low', got 'x'"),
    ({'metric': 'f1'}, "accuracy, loss, .*, got 'f1'"),
    ({'each': [1, 0]}, "'each' has 2 entries for 3 examples"),
    ({'each': [1, 0, True]}, "a list of numbers in 'each'"),
    ({'each': None}, "one of 'each' and 'weights' is null"),
    ({'idx': None}, "a list of numbers in 'idx'"),
    ({'data_sha': 7}, "expected str or null in 'data_sha', got 7"),
    ({'surplus': 1}, r"it lacks \[\], and has the unknown \['surplus'\]"),
  ],
)
def test_a_broken_row_is_one_sentence(tmp_path, changes, message):
  path = tmp_path / 'rows.jsonl'
  results.write(path, ROWS[:1])
  good = path.read_text()
  path.write_text(good + json.dumps(json.loads(good) | changes) + '\n')
  with pytest.raises(ValueError, match=f'^line 2 of .*{message}') as e:
    results.read(path)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('text', ['{"run": ', '[1, 2]', 'null', ''])
def test_a_line_that_is_no_object_is_one_sentence(tmp_path, text):
  path = tmp_path / 'rows.jsonl'
  path.write_text(text and text + '\n')
  with pytest.raises(ValueError, match='JSON|holds no results'):
    results.read(path)


def test_a_missing_file_is_one_sentence(tmp_path):
  with pytest.raises(ValueError, match="none.jsonl' does not exist; make it"):
    results.read(str(tmp_path / 'none.jsonl'))
  (tmp_path / 'binary').write_bytes(b'\xff\xfe\x00')
  with pytest.raises(ValueError, match='is no text'):
    results.read(tmp_path / 'binary')
