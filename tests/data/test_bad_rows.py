# SPDX-License-Identifier: Apache-2.0
"""A bad row is an error, or it is left out and told; nothing in between."""

import gzip
import json
import pickle
import re

import pytest

from moepeft.data import example as example_lib
from moepeft.data.example import BadRow, BadRows
from moepeft.data.readers import jsonl_rows

GOOD = dict(dataset='d', template='t', idx=3, inputs='in', targets='out')
BROKEN = [
  ('{"inputs": ', 'not JSON'),
  ('[1]', 'expected an object'),
  (json.dumps(GOOD | {'inputs': ' '}), "expected text in 'inputs'"),
  (json.dumps(dict(inputs='q')), "expected text in 'targets', got None"),
  (json.dumps(GOOD | {'targets': 3}), "expected text in 'targets', got 3"),
  (json.dumps(GOOD | {'targets': '\ud800'}), 'half of a char.* .targets.'),
  (json.dumps(GOOD | {'idx': 1.5}), 'whole number or text'),
  (json.dumps(GOOD | {'dataset': 7}), "expected text in 'dataset', got 7"),
  (json.dumps(GOOD | {'choices': ['out', 'out']}), 'two or more different'),
  (json.dumps(GOOD | {'choices': ['out', 'a', 'a']}), 'two or more different'),
  ('{"idx": ' + '1' * 5000 + '}', 'not JSON'),
  ('[' * 99999, 'nested too deeply'),
]


def write(path, *lines):
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


@pytest.mark.parametrize(('line', 'said'), BROKEN)
def test_a_bad_row_is_an_error_that_names_it_or_is_left_out(
  tmp_path, line, said
):
  good = json.dumps(GOOD)
  path = write(tmp_path / 'r.jsonl', good, line, good)
  with pytest.raises(ValueError, match=f'r.jsonl, line 2: .*{said}'):
    jsonl_rows.read(path)
  actual = jsonl_rows.read(path, on_bad_row='skip')
  assert len(actual) == 2 and actual.examples[1].targets == 'out'
  (reason,) = actual.skipped
  assert reason.startswith(f'{path}, line 2: ') and re.search(said, reason)
  assert actual.notes(path) == [
    f'skipped 1 bad row of {path}, the first: {reason}'
  ]


def test_a_line_that_is_not_utf8_is_a_bad_row(tmp_path):
  path = tmp_path / 'r.jsonl'
  good = json.dumps(GOOD).encode()
  path.write_bytes(good + b'\n{"inputs": "\xff"}\n')
  with pytest.raises(ValueError, match='line 2: not UTF-8; mend'):
    jsonl_rows.read(str(path))
  assert len(jsonl_rows.read(str(path), on_bad_row='skip')) == 1


def test_good_rows_leave_nothing_to_tell(tmp_path):
  actual = jsonl_rows.read(write(tmp_path / 'r.jsonl', json.dumps(GOOD)))
  assert (actual.skipped, actual.notes('p')) == ((), [])


def test_a_file_of_bad_rows_only_is_an_error(tmp_path):
  path = write(tmp_path / 'r.jsonl', '[1]', '[2]')
  with pytest.raises(ValueError, match='2 bad rows and no good one, the first'):
    jsonl_rows.read(path, on_bad_row='skip')


def test_a_cut_file_is_an_error_where_bad_rows_are_skipped_too(tmp_path):
  path = tmp_path / 'r.jsonl.gz'
  # Numbers, or gzip would have it all in the part that is left.
  rows = [json.dumps(GOOD | {'idx': i**5}) for i in range(999)]
  data = gzip.compress('\n'.join(rows).encode())
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match='cannot be read to its end'):
    jsonl_rows.read(str(path), on_bad_row='skip')


def test_what_becomes_of_bad_rows_is_one_of_two(tmp_path):
  path = write(tmp_path / 'r.jsonl', json.dumps(GOOD))
  with pytest.raises(ValueError, match="'error' or 'skip'; got 'ignore'"):
    jsonl_rows.read(path, on_bad_row='ignore')


def odd(row, place):
  """An example of odd numbers; none of even ones; seven is bad."""
  if row['n'] == 7:
    raise BadRow('seven')
  fields = GOOD | {'inputs': str(row['n']), 'idx': place}
  return example_lib.parse_example(fields, '') if row['n'] % 2 else None


def fails(row, place):
  raise BadRow('always')


def test_examples_are_made_when_they_are_asked_for():
  table = [{'n': n} for n in (2, 3, 5, 7, 11)]
  bad = BadRows('skip')
  actual = example_lib.lazy_examples('t', table, (odd,), 'row {}'.format, bad)
  # Left are 3, 5 and 11, at places 1, 2 and 4.
  assert [(e.inputs, e.idx) for e in actual] == [('3', 1), ('5', 2), ('11', 4)]
  assert (actual.skipped, actual.inapplicable) == (('row 3: seven',), 1)
  assert [e.inputs for e in actual[1:]] == ['5', '11']
  assert actual[-1].inputs == '11'
  table[4]['n'] = 13
  assert actual[2].inputs == '13'
  # Workers get a copy.
  copied = pickle.loads(pickle.dumps(actual.examples))
  assert [e.inputs for e in copied] == ['3', '5', '13']


def test_a_maker_that_never_succeeds_is_no_matter_of_bad_rows():
  table = [{'n': 3}, {'n': 5}]
  with pytest.raises(ValueError, match='no row of t is good, the first: row 0'):
    example_lib.lazy_examples(
      't', table, (odd, fails), 'row {}'.format, BadRows('skip')
    )
