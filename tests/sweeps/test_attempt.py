# SPDX-License-Identifier: Apache-2.0
"""Processes of trials: their errors, and those that a dead sweep left."""

import json
import os
import signal
import sys
import time

import pytest

from moepeft.runs.directory import is_locked, open_workdir
from moepeft.sweeps import attempt as attempt_lib
from moepeft.sweeps import display, runner
from moepeft.sweeps.runner import Sweep

from .planted import planted

# The process of a trial: ends as its last argument says.
TRIAL = """
import json, os, sys
run, end = sys.argv[1:]
os.makedirs(run, exist_ok=True)
print('step 1')
if end == 'well':
  json.dump({'seconds': 1.5}, open(os.path.join(run, 'summary.json'), 'w'))
else:
  print(f'error: {end}', file=sys.stderr)
  sys.exit(2)
"""


def command(directory, trial, end):
  return [sys.executable, '-S', '-c', TRIAL, directory.run(trial).path, end]


@pytest.mark.parametrize(
  ('code', 'output', 'error'),
  [
    (
      2,
      'step 1\nerror: memory ran out; lower it\n',
      'memory ran out; lower it',
    ),
    (1, 'Traceback\n  File "x"\nKeyError: 3\n', 'KeyError: 3'),
    (1, '', 'the run ended with code 1'),
    (-9, 'step 1\n', 'the run was ended by SIGKILL, perhaps as memory ran out'),
    (-15, 'step 1\n', 'the run was ended by SIGTERM'),
  ],
)
def test_an_end_is_one_sentence(code, output, error):
  assert attempt_lib.describe_end(code, output) == error


def test_a_failure_is_a_row_and_the_others_are_run(tmp_path, capsys):
  directory, trials = planted(tmp_path, 'seed=0..3')
  sweep = Sweep(directory, trials)
  ends = ['well', 'the disk is full', 'well', 'well']
  runner.run(
    sweep,
    directory,
    lambda trial: command(directory, trial, ends[trial.index]),
    2,
    display.Display({t.name: directory.run(t) for t in trials}, 2),
  )
  rows = [
    json.loads(line)
    for line in (tmp_path / 'results.jsonl').read_text().splitlines()
  ]
  assert [row['status'] for row in rows] == [
    *('finished', 'failed', 'finished', 'finished')
  ]
  assert rows[1]['error'] == 'the disk is full'
  assert 'step 1' in (tmp_path / 'logs' / 'seed-1.log').read_text()
  lines = capsys.readouterr().out.splitlines()
  assert 'seed-0  started' in lines
  assert 'seed-1  failed: the disk is full' in lines
  assert all('\x1b' not in line for line in lines)


def test_a_trial_waits_for_the_process_that_a_dead_sweep_left(tmp_path):
  directory, (trial,) = planted(tmp_path, 'seed=0')
  run = directory.run(trial)
  assert not is_locked(run.path)
  with open_workdir(run.path):
    assert is_locked(run.path)
    attempt = attempt_lib.Attempt(
      directory, trial, command(directory, trial, 'well')
    )
    assert not attempt.is_done()
    assert not os.path.exists(directory.log_file(trial))
    # The process ends its run.
    with open(run.summary_file, 'w') as file:
      json.dump({'seconds': 2.5}, file)
    assert not attempt.is_done()
  assert attempt.is_done() and attempt.error() == ''
  assert not os.path.exists(directory.log_file(trial)), 'it was run again'


def test_a_signal_ends_the_process_and_leaves_no_row(tmp_path):
  directory, (trial,) = planted(tmp_path, 'seed=0')
  attempt = attempt_lib.Attempt(
    directory,
    trial,
    [sys.executable, '-S', '-c', 'import time; time.sleep(99)'],
  )
  start = time.monotonic()
  runner.stop([attempt])
  assert time.monotonic() - start < 30
  assert attempt._process.returncode == -signal.SIGTERM
  assert Sweep(directory, [trial]).to_run() == [trial]


def test_the_last_step_is_read_from_the_end_of_the_log(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert attempt_lib.last_metrics(str(path)) == (0, None)
  path.write_text(
    '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n'
    '{"step": 2, "validation_loss": 9}\n{"step": 3, "lo'
  )
  assert attempt_lib.last_metrics(str(path)) == (2, 2.5)
