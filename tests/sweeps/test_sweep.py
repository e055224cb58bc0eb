# SPDX-License-Identifier: Apache-2.0
"""The command: what it refuses and prints; killed, it ends with equal rows.

Real runs are slow.
"""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from moepeft.checkpoints.restore import restore_adapter
from moepeft.runs import metrics_log
from tests import ROOT

from .. import commands

GRID = 'method=lora(rank=2)|molora(experts=2, rank=2); seed=0,1'
RATES = 'optimizer.learning_rate=1e-3,3e-3'
# A run of a few steps with a checkpoint every other one.
OPTIONS = (
  '--config=configs/molora_t5.py',
  '--config.steps=6',
  '--config.batch_size=2',
  '--config.checkpoint.every_steps=2',
  '--config.evaluation.before=False',
  '--config.evaluation.tasks=storage',
  '--config.evaluation.max_examples=2',
  '--config.evaluation.max_batches=1',
  '--config.evaluation.batch_size=2',
  '--config.log.every_steps=2',
  '--config.log.plots=False',
)
# Of the machine, not of the model.
SPEED = ('steps_per_s', 'examples_per_s', 'tokens_per_s', 'memory_bytes')


def sweep(*args):
  return commands.run('moepeft.sweep', *args)


def test_a_dry_run_prints_the_trials_and_how_many_are_run(tmp_path):
  done = sweep(
    *('--dry_run', '--config.steps=7', f'--workdir={tmp_path / "s"}'),
    *(f'--grid={GRID}; {RATES}', '--select=optimizer.learning_rate'),
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 9
  assert re.match(
    r" +1  lora-rank-2_seed-0_learning_rate-0.003 +'--config.method=lora\(rank="
    r"2\)' --config.seed=0 --config.optimizer.learning_rate=0.003$",
    lines[1],
  )
  # Two rates with the first seed and one with the second, for two methods.
  assert lines[8] == (
    '8 trials, of which 6 are run: optimizer.learning_rate chosen on validation'
  )
  assert not (tmp_path / 's').exists()


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (('--grid=sed=0', '--dry_run'), 'did you mean'),
    (('--dry_run',), '--grid is missing'),
    (('--grid=seed=0',), '--workdir is missing'),
    (
      ('--grid=seed=0,1', '--config.seed=3', '--dry_run'),
      'config.seed is a key of --grid and a flag',
    ),
    (
      ('--grid=optimizer.name=adamv', '--dry_run'),
      "did you mean 'adamw'?",
    ),
    (
      *(
        (
          *('--grid=steps=1,2', '--select=steps', '--dry_run'),
          '--config.evaluation.after=False',
        ),
        '--select needs validation losses',
      ),
    ),
  ],
)
def test_a_wrong_command_is_refused_before_anything_is_written(args, message):
  done = sweep(*args)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_an_array_job_is_written_and_its_order_is_that_of_select(tmp_path):
  done = sweep(
    *('--slurm', f'--workdir={tmp_path}', '--sbatch=--gpus=1'),
    *(f'--grid={GRID}; {RATES}', '--select=optimizer.learning_rate'),
    *('--config.steps', '7', '--jobs=3'),
  )
  assert done.returncode == 0, done.stderr
  script = (tmp_path / 'sweep.sbatch').read_text()
  assert '#SBATCH --array=0-1,4-5%3\n#SBATCH --gpus=1\n' in script
  assert ' --config.steps 7 ' in script
  assert f"'--grid={GRID}; {RATES}'" in script
  assert '--array=2-3,6-7%3 ' in done.stdout
  # A task of a seed that waits for the choice.
  done = sweep(
    *('--trial=2', f'--workdir={tmp_path}', '--config.steps=7'),
    *(f'--grid={GRID}; {RATES}', '--select=optimizer.learning_rate'),
  )
  assert done.returncode == 2
  assert 'trial 2 waits for a choice of --select' in done.stderr


def start(workdir, *args):
  log = open(f'{workdir}.log', 'a')
  return subprocess.Popen(
    [
      *(
        sys.executable,
        '-m',
        'moepeft.sweep',
        *OPTIONS,
        f'--workdir={workdir}',
      ),
      *args,
    ],
    cwd=ROOT,
    stdout=log,
    stderr=log,
  )


def rows(workdir):
  """The rows without time, and with runs relative to the sweep."""
  text = (workdir / 'results.jsonl').read_text()
  read = [json.loads(line) for line in text.splitlines()]
  for row in read:
    row.pop('seconds', None)
    row['run'] = os.path.relpath(row['run'], workdir)
  return read


def kill_trials(workdir):
  """Kills the processes that lock the runs of a sweep."""
  for lock in workdir.glob('runs/*/lock'):
    if match := re.match(r'pid (\d+) on', lock.read_text()):
      with contextlib.suppress(ProcessLookupError):
        os.kill(int(match[1]), signal.SIGKILL)


SELECTED = (
  f'--grid={GRID}; {RATES}',
  '--select=optimizer.learning_rate',
  '--jobs=2',
)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A sweep that nobody disturbs."""
  workdir = tmp_path_factory.mktemp('whole') / 'sweep'
  assert start(workdir, *SELECTED).wait() == 0, f'see {workdir}.log'
  return workdir


def kill_at_random_moments(workdir, *args):
  """Starts a sweep six times, kills it, and lets the seventh one end."""
  dice = random.Random(time.time_ns())
  for number in range(6):
    process = start(workdir, *args)
    time.sleep(dice.uniform(2, 25))
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Every other time the trials go on, and the next sweep waits for them.
    if number % 2:
      kill_trials(workdir)
  assert start(workdir, *args).wait() == 0


@pytest.mark.slow
def test_a_sweep_is_killed_at_random_moments_and_ends_with_equal_rows(
  whole, tmp_path
):
  workdir = tmp_path / 'sweep'
  kill_at_random_moments(workdir, *SELECTED)
  assert rows(workdir) == rows(whole)
  assert [row['status'] for row in rows(whole)].count('finished') == 6
  assert [row['status'] for row in rows(whole)].count('left out') == 2


@pytest.mark.slow
def test_a_killed_sweep_of_trials_together_has_the_rows_of_trials_alone(
  whole, tmp_path
):
  workdir = tmp_path / 'sweep'
  kill_at_random_moments(workdir, *SELECTED, '--vmap=3')
  log = pathlib.Path(f'{workdir}.log').read_text()
  assert 'trained together with 1 more' in log
  for row, row_alone in zip(rows(workdir), rows(whole), strict=True):
    # The losses in it are rounded.
    assert (
      row.pop('why').split(' has ')[0]
      == (row_alone.pop('why').split(' has ')[0])
    )
    losses, losses_alone = (
      r.pop('validation', {}).pop('loss', 0) for r in (row, row_alone)
    )
    # The tolerance of recorded losses, for the same reason: products are added
    # in another order.
    assert losses == pytest.approx(losses_alone, rel=1e-5)
    assert row == row_alone


@pytest.mark.slow
def test_sigterm_saves_the_trials_and_the_same_command_continues(
  whole, tmp_path
):
  workdir = tmp_path / 'sweep'
  process = start(workdir, *SELECTED)
  while not [*workdir.glob('runs/*/metrics.jsonl')]:
    assert process.poll() is None
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  assert process.wait() == 130
  assert {row['status'] for row in rows(workdir)} <= {'unfinished', 'finished'}
  assert start(workdir, *SELECTED).wait() == 0
  assert rows(workdir) == rows(whole)


@pytest.mark.slow
def test_two_sweeps_in_one_directory_are_refused(tmp_path):
  workdir = tmp_path / 'sweep'
  process = start(workdir, *SELECTED)
  try:
    while not (workdir / 'results.jsonl').exists():
      assert process.poll() is None
      time.sleep(0.1)
    done = sweep(*OPTIONS, f'--workdir={workdir}', *SELECTED)
    assert done.returncode == 2
    assert f'(pid {process.pid} on ' in done.stderr
  finally:
    process.send_signal(signal.SIGTERM)
    process.wait()


@pytest.mark.slow
def test_a_trial_is_the_run_that_the_same_flags_give_by_hand(whole, tmp_path):
  name = 'molora-experts-2-rank-2_seed-1_learning_rate-0.003'
  twin = name.replace('0.003', '0.001')
  if not (whole / 'runs' / name / 'summary.json').exists():
    name = twin
  rate = name.rpartition('-')[2]
  subprocess.run(
    [
      *(sys.executable, '-m', 'moepeft.train', *OPTIONS),
      '--config.method=molora(experts=2, rank=2)',
      *('--config.seed=1', f'--config.optimizer.learning_rate={rate}'),
      f'--workdir={tmp_path / "run"}',
    ],
    cwd=ROOT,
    check=True,
  )
  adapters = [
    restore_adapter(str(path))[0]
    for path in (whole / 'runs' / name, tmp_path / 'run')
  ]
  assert [a.tobytes() for a in jax.tree.leaves(adapters[0])] == [
    a.tobytes() for a in jax.tree.leaves(adapters[1])
  ]
  losses = [
    [
      {k: v for k, v in row.items() if k not in SPEED}
      for row in metrics_log.read(str(path / 'metrics.jsonl'))
    ]
    for path in (whole / 'runs' / name, tmp_path / 'run')
  ]
  assert losses[0] == losses[1]
  config, by_hand = (
    (path / 'config.json').read_text()
    for path in (whole / 'runs' / name, tmp_path / 'run')
  )
  assert config == by_hand


@pytest.mark.slow
def test_tables_read_the_runs(whole):
  done = commands.run('moepeft.tables', whole)
  assert done.returncode == 0, done.stderr
  assert 'molora' in done.stdout and 'lora' in done.stdout


@pytest.mark.slow
def test_an_index_of_an_array_job_is_one_trial(tmp_path):
  workdir = tmp_path / 'sweep'
  arguments = (f'--grid={GRID}', '--slurm', '--evaluate')
  assert start(workdir, *arguments).wait() == 0
  subprocess.run(
    ['bash', workdir / 'sweep.sbatch'],
    env=os.environ | {'SLURM_ARRAY_TASK_ID': '3', 'PYTHONPATH': str(ROOT)},
    check=True,
  )
  assert [row['status'] for row in rows(workdir)] == [
    *('unfinished', 'unfinished', 'unfinished', 'finished')
  ]
  (run,) = workdir.glob('runs/*')
  assert run.name == 'molora-experts-2-rank-2_seed-1'
  evaluation = json.loads((run / 'evaluation.json').read_text())
  assert rows(workdir)[3]['test'] == evaluation['means']
  done = commands.run('moepeft.tables', run)
  assert done.returncode == 0, done.stderr
  # Intervals over the examples of moepeft.evaluate.
  assert '95 % interval' in done.stdout


@pytest.mark.slow
def test_a_trial_that_cannot_run_is_a_row_with_its_sentence(tmp_path):
  workdir = tmp_path / 'sweep'
  grid = "method=lora(rank=2)|lora(rank=2, targets='nowhere'); seed=0"
  assert start(workdir, f'--grid={grid}').wait() == 1
  good, bad = rows(workdir)
  assert good['status'] == 'finished' and bad['status'] == 'failed'
  assert 'nowhere' in bad['error'] and '\n' not in bad['error']
