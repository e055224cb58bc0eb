# SPDX-License-Identifier: Apache-2.0
"""Runs of trials that are trained together are those of trials alone."""

import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft import train, train_trials
from moepeft.checkpoints.restore import restore_adapter
from moepeft.runs import metrics_log
from moepeft.sweeps import display, grid, vmap_groups
from moepeft.sweeps.attempt import Attempt
from moepeft.sweeps.directory import SweepDirectory
from moepeft.sweeps.trials import make_trials
from moepeft.training import vmapped

from ..invariants import bases
from ..invariants.cases import PAIRS, TOLERANCE
from .planted import planted

GRID = (
  'seed=0,1; optimizer.learning_rate=1e-3,4e-3;'
  'router_losses.load_balance=0.01,0.3'
)
# Six steps of AdamW move a parameter by six rates, 0.024; a gradient's last
# digit moves one by a hundredth of a rate where the gradient is near 0.
# Adafactor has no floor in its denominator: where the gradient is the rounding
# of a sum, a parameter moves by up to the rate times its size, 4e-3 * 0.02. In
# float64 both have the bounds of tests/training/test_vmapped.py.
ATOL = {'adamw': 4e-5, 'adafactor': 8e-5}
# Of the machine, not of the model.
SPEED = ('steps_per_s', 'examples_per_s', 'tokens_per_s', 'memory_bytes')


def trials_of(text):
  return make_trials(config_lib.default(), grid.parse(text))


def groups(text, most):
  return [
    [trial.index for trial in trials]
    for trials in vmap_groups.group(trials_of(text), most)
  ]


def test_groups_are_of_one_program_and_of_a_size():
  assert groups(GRID, 8) == [[*range(8)]]
  assert groups(GRID, 5) == [[0, 1, 2, 3, 4], [5, 6, 7]]
  # Another shape, another program; a loss without weight is left out of it.
  assert groups('seed=0,1; batch_size=2,3', 9) == [[0, 2], [1, 3]]
  assert groups('loss.z_loss=0,0.1,0.2', 9) == [[0], [1, 2]]


def test_what_trains_alone_has_a_reason():
  assert groups('method=full|ia3; seed=0,1', 9) == [[0], [1], [2, 3]]
  full, _, (ia3, _) = vmap_groups.group(
    trials_of('method=full|ia3; seed=0,1'), 9
  )
  assert vmap_groups.why_alone(full[0]) == (
    'full trains the base, which trials of --vmap share'
  )
  assert vmap_groups.why_alone(ia3) == ''


def test_a_group_tells_its_trials_and_an_error_is_of_its_trial(
  tmp_path, capsys
):
  directory, trials = planted(tmp_path, 'seed=0..3')
  # The first trial ends well, the second with an error of its own, the third
  # not at all, and the fourth has ended before.
  ended = directory.run(trials[3])
  os.makedirs(ended.path)
  pathlib.Path(ended.summary_file).write_text('{"seconds": 1}')
  script = (
    f"mkdir -p '{directory.run(trials[0]).path}';"
    f"echo '{{\"seconds\": 1}}' > '{directory.run(trials[0]).summary_file}';"
    f"echo 'error: it diverged' >> '{directory.log_file(trials[1])}';"
    'echo "error: memory ran out"; exit 2'
  )
  calls = []

  def command(left, module):
    calls.append(([trial.index for trial in left], module))
    return ['bash', '-c', script]

  attempt = Attempt(directory, trials, command)
  display.Display({t.name: directory.run(t) for t in trials}, 4).start(
    attempt.trials, True
  )
  attempt.wait()
  assert attempt.is_done()
  assert calls == [([0, 1, 2], 'moepeft.train')]
  assert [attempt.error(trial) for trial in trials] == [
    *('', 'it diverged', 'memory ran out', '')
  ]
  assert (
    'seed-0  started, trained together with 3 more\n' in capsys.readouterr().out
  )


# ------------------------------------------------------------- real runs ---


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  return bases.write(tmp_path_factory.mktemp('models'))


def config_of(family, models, steps=6):
  c = config_lib.default()
  c.model.path = models[family]
  c.objective = 'causal' if family == 'llama' else 'seq2seq'
  c.data.tokenizer, c.data.length = 'bytes', 128
  c.data.inputs_length, c.data.targets_length = 96, 12
  c.model.dropout = 0.0
  c.method = 'molora(experts=3, rank=2)'
  c.steps, c.batch_size = steps, 3
  c.evaluation.tasks, c.evaluation.max_examples = 'storage', 3
  c.evaluation.max_batches, c.evaluation.batch_size = 1, 4
  c.checkpoint.every_steps = c.log.every_steps = 3
  c.evaluation.every_steps = 3
  c.log.trackers, c.log.plots = '', False
  return c


def train_alone(directory, trials):
  for trial in trials:
    train.train(trial.config, directory.run(trial).path)


def train_group(directory, trials):
  assert train_trials.train_together(trials, directory) == [0] * len(trials)


def assert_equal_adapters(run, alone):
  trained, trained_alone = (restore_adapter(r.path)[0] for r in (run, alone))
  atol = ATOL[run.load_config().optimizer.name]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
    trained,
    trained_alone,
  )


def assert_equal_runs(run, alone):
  """The runs of a trial that was trained together, and alone."""
  assert pathlib.Path(run.config_file).read_text() == (
    pathlib.Path(alone.config_file).read_text()
  )
  assert sorted(os.listdir(run.path)) == sorted(os.listdir(alone.path))
  assert run.before() == alone.before()
  rows, rows_alone = (
    list(metrics_log.read(r.metrics_file)) for r in (run, alone)
  )
  assert [row.keys() for row in rows] == [row.keys() for row in rows_alone]
  for row, row_alone in zip(rows, rows_alone, strict=True):
    for key, value in row.items():
      if key in SPEED or key == 'routing':
        continue
      # The tolerances of the recorded losses, for the same reason: XLA adds
      # the terms of float32 products in an order of its own.
      rtol = TOLERANCE.get(key, TOLERANCE['loss'])
      # A reward at the start is the difference of equal log-probabilities.
      np.testing.assert_allclose(
        value, row_alone[key], rtol, atol=1e-6, err_msg=key
      )
  after, after_alone = run.after(), alone.after()
  assert after['means'] == after_alone['means']
  assert after['rows'] == after_alone['rows']
  np.testing.assert_allclose(
    after['validation_loss'], after_alone['validation_loss'], TOLERANCE['loss']
  )
  assert_equal_adapters(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('family', 'changes'),
  [
    ('t5', {'model.dropout': 0.1}),
    ('t5', {'optimizer.name': 'adafactor', 'gradient_accumulation_steps': 3}),
    ('llama', {'method': 'hydralora(experts=3, rank=2)'}),
    (
      'llama',
      {'objective': 'dpo', 'preference.reference': 'precomputed'} | PAIRS,
    ),
  ],
)
def test_runs_together_are_those_of_trials_alone(
  family, changes, models, tmp_path
):
  config = config_of(family, models)
  config.optimizer.schedule, config.optimizer.warmup_steps = 'cosine', 2
  config.update_from_flattened_dict(changes)
  trials = [make_trials(config, grid.parse(GRID))[i] for i in (0, 3, 6)]
  alone, grouped = (SweepDirectory(str(tmp_path / x)) for x in ('a', 'b'))
  for directory in (alone, grouped):
    directory.prepare(config)
  train_alone(alone, trials)
  train_group(grouped, trials)
  for trial in trials:
    assert_equal_runs(grouped.run(trial), alone.run(trial))
    log = pathlib.Path(grouped.log_file(trial)).read_text()
    assert f'workdir  {grouped.run(trial).path}' in log
    assert 'step 6/6' in log and 'done in' in log


@pytest.mark.slow
def test_trials_are_resumed_alone_and_together(models, tmp_path):
  short, whole = (config_of('t5', models, steps) for steps in (3, 6))
  text = 'seed=0,1; optimizer.learning_rate=1e-3,4e-3'
  begun, trials = (make_trials(c, grid.parse(text)) for c in (short, whole))
  alone, mixed = (SweepDirectory(str(tmp_path / x)) for x in ('a', 'b'))
  for directory in (alone, mixed):
    directory.prepare(whole)
  train_alone(alone, trials[:3])
  # The first two begin together, and the first goes on alone; the second goes
  # on with the third, which is not at its step.
  train_group(mixed, begun[:2])
  for trial in begun[:2]:
    os.remove(mixed.run(trial).summary_file)
  train_alone(mixed, trials[:1])
  train_group(mixed, trials[1:3])
  for trial in trials[:3]:
    run, run_alone = (d.run(trial) for d in (mixed, alone))
    assert_equal_adapters(run, run_alone)
    assert run.after()['means'] == run_alone.after()['means']
  log = pathlib.Path(mixed.log_file(trials[1])).read_text()
  assert 'resumed at step 3' in log


@pytest.mark.slow
def test_a_trial_that_diverges_ends_alone_and_its_log_says_so(models, tmp_path):
  config = config_of('t5', models)
  # A parameter is multiplied by 1 - rate * decay: by 0, or by -1e5 a step.
  config.optimizer.weight_decay = 1000.0
  directory = SweepDirectory(str(tmp_path / 's'))
  directory.prepare(config)
  trials = make_trials(config, grid.parse('optimizer.learning_rate=1e-3,100'))
  codes = train_trials.train_together(trials, directory)
  assert codes == [0, 2]
  assert directory.run(trials[0]).summary()
  log = pathlib.Path(directory.log_file(trials[1])).read_text()
  assert 'error: the ' in log and ' at step ' in log
  assert not directory.run(trials[1]).summary()


@pytest.mark.slow
def test_a_signal_saves_all_trials(models, tmp_path, monkeypatch):
  from moepeft import train_trials

  config = config_of('t5', models)
  directory = SweepDirectory(str(tmp_path / 's'))
  directory.prepare(config)
  trials = make_trials(config, grid.parse('seed=0,1'))
  step, calls = vmapped.VmappedStep.__call__, []

  def signalled(self, batches):
    calls.append(len(batches))
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batches)

  monkeypatch.setattr(train_trials.VmappedStep, '__call__', signalled)
  before = signal.getsignal(signal.SIGTERM)
  codes = train_trials.train_together(trials, directory)
  assert codes == [128 + signal.SIGTERM] * 2
  assert signal.getsignal(signal.SIGTERM) is before
  for trial in trials:
    assert directory.run(trial).latest_step() == 2
    assert 'stopped by SIGTERM after step 2' in (
      pathlib.Path(directory.log_file(trial)).read_text()
    )
  monkeypatch.setattr(train_trials.VmappedStep, '__call__', step)
  train_group(directory, trials)
  for trial in trials:
    steps = [
      row['step']
      for row in map(json.loads, open(directory.run(trial).metrics_file))
      if 'loss' in row
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
