# SPDX-License-Identifier: Apache-2.0
"""Processes of trials: their errors, and those that a dead sweep left."""

import json
import os
import signal
import sys
import time
import types

import pytest

from moepeft.runs.directory import is_locked, open_workdir
from moepeft.sweeps import attempt as attempt_lib
from moepeft.sweeps import display, runner
from moepeft.sweeps.attempt import Attempt
from moepeft.sweeps.directory import SweepDirectory
from moepeft.sweeps.runner import Sweep

from .planted import planted

# A process of a trial: ends as its last argument says.
TRIAL = """
import json, os, sys
module, run, end = sys.argv[1:]
os.makedirs(run, exist_ok=True)
print('step 1', module)
if end in ('well', 'trained') and module == 'moepeft.train':
  after = {'means': {}, 'validation_loss': 0.25}
  json.dump(after, open(os.path.join(run, 'after.json'), 'w'))
  json.dump({'seconds': 1.5}, open(os.path.join(run, 'summary.json'), 'w'))
elif end == 'well':
  means = {'means': {'A seen': 0.75}}
  # Chats and texts have no evaluation.jsonl.
  json.dump(means, open(os.path.join(run, 'evaluation.json'), 'w'))
elif end == 'early':
  pass
else:
  print(f'error: {end}', file=sys.stderr)
  sys.exit(2)
"""
SLEEP = 'import time; time.sleep(99)'


def command(directory, *ends):
  """The trial's command, with an end for each index."""
  return lambda trials, module: [
    *(sys.executable, '-S', '-c', TRIAL, module),
    *(directory.run(trials[0]).path, ends[trials[0].index]),
  ]


def run(directory, trials, *ends):
  """Runs the trials, and returns their rows."""
  runner.run(
    Sweep(directory, trials),
    directory,
    command(directory, *ends),
    2,
    display.Display({t.name: directory.run(t) for t in trials}, 2),
  )
  with open(directory.results_file) as lines:
    return [json.loads(line) for line in lines]


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
  rows = run(directory, trials, 'well', 'the disk is full', 'well', 'early')
  assert [row['status'] for row in rows] == [
    *('finished', 'failed', 'finished', 'failed')
  ]
  assert rows[1]['error'] == 'the disk is full'
  assert rows[3]['error'] == 'moepeft.train ended without its last file'
  assert 'step 1' in (tmp_path / 'logs' / 'seed-1.log').read_text()
  lines = capsys.readouterr().out.splitlines()
  assert 'seed-0  started' in lines
  assert 'seed-1  failed: the disk is full' in lines
  assert all('\x1b' not in line for line in lines)


def test_with_evaluate_a_trial_ends_with_moepeft_evaluate(tmp_path):
  _, trials = planted(tmp_path, 'seed=0')
  directory = SweepDirectory(str(tmp_path), evaluates=True)
  (row,) = run(directory, trials, 'well')
  assert row['status'] == 'finished' and row['test'] == {'A seen': 0.75}
  log = (tmp_path / 'logs' / 'seed-0.log').read_text()
  assert log == 'step 1 moepeft.train\nstep 1 moepeft.evaluate\n'
  # A second sweep has nothing to run, and the same rows.
  assert run(directory, trials, 'fails') == [row]


def test_a_trial_whose_evaluation_fails_has_a_loss_to_choose_by(tmp_path):
  _, trials = planted(tmp_path, 'seed=0')
  directory = SweepDirectory(str(tmp_path), evaluates=True)
  (row,) = run(directory, trials, 'trained')
  assert (row['status'], row['error']) == ('failed', 'trained')
  assert row['validation'] == {'loss': 0.25}


def test_a_trial_waits_for_a_run_in_its_directory(tmp_path):
  directory, (trial,) = planted(tmp_path, 'seed=0')
  trial_run = directory.run(trial)
  assert not is_locked(trial_run.path)
  with open_workdir(trial_run.path):
    assert is_locked(trial_run.path)
    attempt = Attempt(directory, [trial], command(directory, 'well'))
    assert not attempt.is_done()
    assert not os.path.exists(directory.log_file(trial))
    # The process ends its run.
    with open(trial_run.summary_file, 'w') as file:
      json.dump({'seconds': 2.5}, file)
    assert not attempt.is_done()
  assert attempt.is_done() and attempt.error(trial) == ''
  assert not os.path.getsize(directory.log_file(trial)), 'it was run again'


def test_a_trial_waits_for_the_process_that_a_dead_sweep_left(tmp_path):
  directory, (trial,) = planted(tmp_path, 'seed=0')
  sleeper = Attempt(
    directory, [trial], lambda *_: [sys.executable, '-S', '-c', SLEEP]
  )
  # It has locked nothing itself yet, as one that still imports libraries.
  attempt = Attempt(directory, [trial], command(directory, 'well'))
  assert not attempt.is_done() and attempt._process is None
  sleeper.kill()
  while not attempt.is_done():
    time.sleep(0.01)
  assert attempt.error(trial) == ''
  assert Sweep(directory, [trial]).rows[trial.name]['status'] == 'finished'


def test_a_signal_ends_the_process_and_leaves_no_row(tmp_path):
  directory, (trial,) = planted(tmp_path, 'seed=0')
  attempt = Attempt(
    directory, [trial], lambda *_: [sys.executable, '-S', '-c', SLEEP]
  )
  runner.stop([attempt])
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


def test_a_terminal_has_a_table_of_the_running_trials(
  tmp_path, capsys, monkeypatch
):
  directory, trials = planted(tmp_path, 'seed=0..1; steps=40')
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  monkeypatch.setattr(display.shutil, 'get_terminal_size', lambda: (30, 24))
  shown = display.Display({t.name: directory.run(t) for t in trials}, 1)
  state = types.SimpleNamespace(trials=trials[:1], seconds=9.0)
  os.makedirs(directory.run(trials[0]).path)
  with open(directory.run(trials[0]).metrics_file, 'w') as file:
    file.write('{"step": 10, "loss": 2.5}\n')
  shown.start(trials[:1])
  shown.update([state], 2)
  # Ten steps in 9 s: 27 s more, and 36 s for the other trial. A line is cut to
  # the width, so that it does not wrap.
  table = '1 running, 2 to go, ETA 1:03\n  seed-0_steps-40  step 10/40\n'
  assert capsys.readouterr().out == table
  shown.end({'name': 'seed-0_steps-40', 'status': 'failed', 'error': 'x'}, 9.0)
  # Two lines up, and what is below is cleared.
  assert capsys.readouterr().out == (
    '\x1b[2F\x1b[Jseed-0_steps-40  failed: x\n'
  )
