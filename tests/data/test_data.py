# SPDX-License-Identifier: Apache-2.0
"""Rows in, batches out; broken rows are named by file and line."""

import gzip
import json

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.data import load_tokenizer, open_data
from moepeft.data.batching import seq2seq
from moepeft.data.readers import jsonl_rows
from moepeft.data.split import split_by_idx
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.evaluation import eval_sets
from moepeft.tasks import Example


def row(i=0, **changes):
  fields = dict(dataset='d', template='t', idx=i, inputs='in', targets='out')
  return json.dumps(fields | changes)


def write(path, *lines):
  opened = gzip.open(path, 'wt') if path.suffix == '.gz' else path.open('w')
  with opened as f:
    f.write('\n'.join(lines) + '\n')
  return str(path)


def test_files_gzip_and_directories_are_read_in_order(tmp_path):
  write(tmp_path / 'b.jsonl', row(2), '', row(3))
  write(tmp_path / 'a.jsonl.gz', row(0), row(1))
  assert [e.idx for e in jsonl_rows.read(str(tmp_path))] == [0, 1, 2, 3]
  assert len(jsonl_rows.read(str(tmp_path / 'a.jsonl.gz'))) == 2


def ranked(**fields):
  return json.dumps(dict(inputs='q', choices=['a', 'b']) | fields)


def test_rows_to_rank_need_choices(tmp_path):
  path = write(tmp_path / 'r.jsonl', ranked(label=1), row())
  with pytest.raises(ValueError, match="line 2: a row to rank has 'choices'"):
    jsonl_rows.read(path, ranked=True)


def test_a_label_follows_from_the_targets(tmp_path):
  path = write(tmp_path / 'r.jsonl', ranked(targets='b'))
  assert jsonl_rows.read(path, ranked=True)[0].label == 1


def test_rows_to_rank_take_their_target_from_the_label(tmp_path):
  line = json.dumps(dict(task='x', inputs='q', choices=['a', 'b'], label=1))
  (example,) = jsonl_rows.read(write(tmp_path / 'r.jsonl', line))
  assert (example.task, example.targets, example.label) == ('x', 'b', 1)


@pytest.mark.parametrize(
  ('line', 'said'),
  [
    ('{"inputs": ', 'line 2: not JSON'),
    ('[1]', 'line 2: expected an object'),
    (json.dumps(dict(inputs='q')), "line 2: expected text in 'targets'"),
    (row(targets=''), "line 2: expected text in 'targets'"),
    (row(inputs=3), "line 2: expected text in 'inputs', got 3"),
    (row(idx=None), "line 2: expected a whole number or text in 'idx'"),
    (ranked(label=2), 'line 2: label 2 names none of the 2'),
    (ranked(label='b'), "line 2: label 'b' names none of the 2"),
    (ranked(label=0, targets='b'), 'line 2: the targets .b. are not the'),
    (ranked(label=0, choices=['a']), 'line 2: expected two or more different'),
    (ranked(label=0, choices=['a', 'a']), 'line 2: expected two or more'),
    (ranked(label=0, choices='ab'), 'line 2: expected two or more'),
    (ranked(), 'line 2: label None names none'),
  ],
)
def test_a_broken_row_is_named(tmp_path, line, said):
  path = write(tmp_path / 'r.jsonl', row(), line)
  with pytest.raises(ValueError, match='r.jsonl, ' + said):
    jsonl_rows.read(path)


def test_absent_empty_and_cut_files_are_named(tmp_path):
  with pytest.raises(ValueError, match='does not exist'):
    jsonl_rows.read(str(tmp_path / 'none.jsonl'))
  with pytest.raises(ValueError, match='holds no file of .jsonl'):
    jsonl_rows.read(str(tmp_path))
  (tmp_path / 'e.jsonl').touch()
  with pytest.raises(ValueError, match='holds no rows'):
    jsonl_rows.read(str(tmp_path / 'e.jsonl'))
  whole = write(tmp_path / 'w.jsonl.gz', *[row(i) for i in range(99)])
  data = open(whole, 'rb').read()
  (tmp_path / 'w.jsonl.gz').write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match='cannot be read to its end'):
    jsonl_rows.read(whole)


def examples(sizes):
  return [
    Example(task, 't', i, f'{task} {i}', 'y', (), -1)
    for task, size in sizes.items()
    for i in range(size)
  ]


def test_the_last_idx_of_every_dataset_are_held_out():
  train, held_out = split_by_idx(examples({'a': 20, 'b': 7}), 0.2)
  assert {(e.task, e.idx) for e in held_out} == {
    *(('a', i) for i in range(16, 20)),
    ('b', 6),
  }
  assert len(train) + len(held_out) == 27


def test_closed_templates_get_their_choices_from_training():
  train = [Example('a', 't', i, 'x', y, (), -1) for i, y in enumerate('nyn')]
  held_out = [
    Example('a', 't', 9, 'x', 'y', (), -1),
    Example('a', 't', 9, 'x', 'other', (), -1),
    Example('a', 'u', 9, 'x', 'y', (), -1),
  ]
  (ranked,) = eval_sets.with_closed_choices(train, held_out)
  assert ranked.choices == ('n', 'y') and ranked.label == 1


def test_bytes_round_trip_and_know_no_special_ids():
  words = ByteTokenizer()
  text = 'naïve 漢字'
  assert words.decode(words.encode(text) + [words.eos, 0]) == text
  assert min(words.encode('\x00')) == 3


def test_a_batch_has_eos_shifted_targets_and_masks():
  rows = [Example('a', 't', 0, 'ab', 'c', (), -1)]
  x, y, _ = zip(
    *seq2seq.encode_examples(ByteTokenizer(), rows * 2, 5, 3), strict=True
  )
  batch = seq2seq.pad_pairs(x, y, 5, 3)
  a, b, c = (ord(x) + 3 for x in 'abc')
  np.testing.assert_array_equal(batch['inputs'], [[a, b, 1, 0, 0]] * 2)
  np.testing.assert_array_equal(batch['targets'], [[c, 1, 0]] * 2)
  np.testing.assert_array_equal(batch['decoder_inputs'], [[0, c, 1]] * 2)
  np.testing.assert_array_equal(
    batch['targets_mask'], [[True, True, False]] * 2
  )
  np.testing.assert_array_equal(batch['inputs_mask'].sum(1), [3, 3])


def test_long_text_is_cut_before_eos_and_reported():
  long = Example('a', 't', 0, 'x' * 9, 'y' * 9, (), -1)
  x, y, cut = seq2seq.encode_example(ByteTokenizer(), long, 4, 3)
  assert (x[-1], y[-1], len(x), len(y), cut) == (1, 1, 4, 3, True)


def test_many_texts_are_encoded_as_one_by_one():
  rows = [Example('a', 't', 0, 'naïve 漢字', 'y' * 9, (), -1)] * 2
  rows.append(Example('a', 't', 0, 'b', 'c', (), -1))
  many = seq2seq.encode_examples(ByteTokenizer(), rows, 11, 5)
  for row, (x, y, _) in zip(rows, many, strict=True):
    one = seq2seq.encode_example(ByteTokenizer(), row, 11, 5)
    assert (x.tolist(), y.tolist()) == one[:2]


def test_unknown_sources_are_named():
  data = config_lib.default().data
  data.source = 'sql'
  with pytest.raises(
    ValueError, match="there is no data source 'sql'; there are tasks, jsonl"
  ):
    open_data(data, 0)
  data.source = 'jsonl'
  with pytest.raises(ValueError, match='set config.data.path'):
    open_data(data, 0)
  with pytest.raises(ValueError, match='no tokenizer could be read'):
    load_tokenizer('/nowhere/at/all')
