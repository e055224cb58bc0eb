# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl is readable, whole and without repeats, whatever happens."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest

from moepeft.runs.metrics_log import MetricsLog, read, stream

from ..disks import full_disk  # noqa: F401


def test_numbers_that_are_not_finite_are_null_in_valid_json(tmp_path):
  row = {
    'step': 1,
    'loss': math.nan,
    'routing': {'q': {'load': [[0.5, math.inf]], 'entropy': (-math.inf,)}},
  }
  MetricsLog(str(tmp_path / 'metrics.jsonl')).write(row)

  def refuse(constant):
    raise AssertionError(f'{constant} is no JSON')

  text = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(text, parse_constant=refuse) == {
    'step': 1,
    'loss': None,
    'routing': {'q': {'load': [[0.5, None]], 'entropy': [None]}},
  }


def test_going_on_repeats_no_step_and_keeps_the_bytes_before(tmp_path):
  first = MetricsLog(str(tmp_path / 'metrics.jsonl'))
  for step in (1, 2, 3, 5):
    first.write({'step': step, 'loss': 0.1 * step})
    # A validation has its step's row too.
    first.write({'step': step, 'validation_loss': 1.0})
  path = tmp_path / 'metrics.jsonl'
  before = path.read_bytes().splitlines(keepends=True)
  again = MetricsLog(str(tmp_path / 'metrics.jsonl'), step=3)
  assert path.read_bytes() == b''.join(before[:6])
  again.write({'step': 4})
  assert [row['step'] for row in read(str(path))] == [1, 1, 2, 2, 3, 3, 4]


def test_going_on_twice_without_a_step_changes_no_byte(tmp_path):
  MetricsLog(str(tmp_path / 'metrics.jsonl')).write({'step': 7, 'loss': 0.25})
  path = tmp_path / 'metrics.jsonl'
  before = path.read_bytes()
  MetricsLog(str(tmp_path / 'metrics.jsonl'), step=7)
  assert path.read_bytes() == before


@pytest.mark.parametrize('line', ['{"ste}', '[1]', '{"loss": 1}', '', 'null'])
def test_a_damaged_line_inside_is_named(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
  with pytest.raises(ValueError, match='line 2 of .*metrics.jsonl') as refused:
    read(str(path))
  assert len(str(refused.value).splitlines()) == 1


def test_rows_are_read_one_by_one(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\nbroken\n')
  rows = stream(str(path))
  assert next(rows) == {'step': 1}


# Writes rows as fast as it can, of very different lengths.
WRITER = """
import sys
from moepeft.runs.metrics_log import MetricsLog
rows = MetricsLog(sys.argv[1] + '/metrics.jsonl', step=int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 1, 10**9):
  load = [0.5] * (1 + step % 997)
  rows.write({'step': step, 'routing': {'q': {'load': load, 'entropy': 0.5}}})
  if step % 100 == 0:
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_loses_no_row_and_repeats_none(tmp_path):
  path = str(tmp_path / 'metrics.jsonl')
  step = 0
  for _ in range(3):
    process = subprocess.Popen(
      [sys.executable, '-c', WRITER, str(tmp_path), str(step)],
      stdout=subprocess.PIPE,
      text=True,
    )
    last_step = [int(process.stdout.readline()) for _ in range(5)][-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    # All that was written before it told so is there.
    steps = [row['step'] for row in read(path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last_step
    # As from a checkpoint that is older than the last row.
    step = last_step - 50


def test_a_full_disk_leaves_whole_lines(full_disk):  # noqa: F811
  rows = MetricsLog(str(full_disk.path / 'metrics.jsonl'))
  site = {'load': [0.5] * 3000, 'entropy': 0.5}
  row = {'step': 1, 'routing': {'q': site}}
  with pytest.raises(OSError, match='No space left'):
    for _ in range(10_000):
      rows.write(row)
  # Twice: what failed must not be half there, nor come with the next.
  with pytest.raises(OSError, match='No space left'):
    rows.write(row)
  rows.close()
  path = full_disk.path / 'metrics.jsonl'
  assert path.read_bytes().endswith(b'\n')
  assert all(read_row == row for read_row in read(str(path)))
  # A cut needs no space.
  MetricsLog(str(full_disk.path / 'metrics.jsonl'), step=0).close()
  assert os.path.getsize(path) == 0
