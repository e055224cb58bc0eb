# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any moment ends as one that never was.

The whole processes, killed for real, are slow; what a signal does is not.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from moepeft import train
from moepeft.checkpoints.manager import Checkpoints
from moepeft.checkpoints.run_progress import RunProgress
from moepeft.evaluation.evaluator import Evaluator
from moepeft.runs import metrics_log
from moepeft.training import setup
from moepeft.training.loop import Stopped
from tests import ROOT

from .test_train import adapter_bytes, base, card  # noqa: F401

# What is of the machine, not of the model.
SPEED = ('steps_per_s', 'examples_per_s', 'tokens_per_s', 'memory_bytes')
STEPS = 40
# Everything random is on: dropout of the model and of the adapter, noise in
# the router, packing in an order of its own.
OPTIONS = (
  '--config.method=molora(experts=3, rank=2, dropout=0.1, '
  'router=softmax(jitter=0.1))',
  '--config.model.dropout=0.1',
  '--config.data.packing=True',
  '--config.data.targets_length=32',
  '--config.batch_size=4',
  '--config.checkpoint.every_steps=2',
  '--config.evaluation.before=False',
  '--config.evaluation.after=False',
  '--config.evaluation.every_steps=7',
  '--config.checkpoint.keep_best=True',
  '--config.log.every_steps=3',
  '--config.log.plots=False',
)


def start(workdir, **options):
  """The process of a run, its output in a file beside the work directory."""
  command = ['-m', 'moepeft.train', '--config=configs/molora_t5.py']
  log = open(f'{workdir}.log', 'a')
  return subprocess.Popen(
    [
      *(sys.executable, *command, f'--workdir={workdir}'),
      *(f'--config.steps={STEPS}', *OPTIONS),
    ],
    cwd=ROOT,
    stdout=log,
    stderr=log,
    **options,
  )


def exported(workdir):
  """{file: bytes} of `python -m moepeft.convert`."""
  output = f'{workdir}-exported'
  command = ['-m', 'moepeft.convert', f'--workdir={workdir}']
  subprocess.run(
    [sys.executable, *command, f'--output={output}'], cwd=ROOT, check=True
  )
  return {f.name: f.read_bytes() for f in pathlib.Path(output).iterdir()}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The export and the rows of a run that nobody disturbs."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  assert start(workdir).wait() == 0
  return exported(workdir), losses(workdir)


def losses(workdir):
  """A run's rows without the entries of speed."""
  rows = metrics_log.read(str(workdir / 'metrics.jsonl'))
  return [{k: v for k, v in row.items() if k not in SPEED} for row in rows]


@pytest.mark.slow
def test_kill_9_at_ten_moments_changes_no_byte(whole, tmp_path):
  workdir, dice, kills = tmp_path / 'run', random.Random(time.time_ns()), []
  for number in range(10):
    process = start(workdir)
    rows = len(losses(workdir))
    if number % 3:
      # In the middle of steps and of saves, of which there are many.
      while len(losses(workdir)) <= rows and process.poll() is None:
        time.sleep(0.05)
      time.sleep(dice.uniform(0, 2))
    else:
      # While it starts, or resumes.
      time.sleep(dice.uniform(0, 9))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, 'it was done before'
    kills.append(max([row['step'] for row in losses(workdir)], default=0))
  print(f'killed at the steps {kills} of {STEPS}')
  assert 0 < kills[-1] < STEPS and len(set(kills)) > 4
  assert start(workdir).wait() == 0
  assert exported(workdir) == whole[0]
  rows = losses(workdir)
  assert [row for row in rows if 'loss' in row] == [
    row for row in whole[1] if 'loss' in row
  ]


@pytest.mark.slow
def test_sigterm_saves_and_is_gone_within_seconds(whole, tmp_path):
  workdir = tmp_path / 'run'
  process = start(workdir)
  while len(losses(workdir)) < 9:
    assert process.poll() is None, pathlib.Path(f'{workdir}.log').read_text()
    time.sleep(0.1)
  sent = time.monotonic()
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == 128 + signal.SIGTERM
  assert time.monotonic() - sent < 10
  log = pathlib.Path(f'{workdir}.log').read_text()
  assert 'stopped by SIGTERM after step' in log and 'Traceback' not in log
  step = int(log.split('SIGTERM after step ')[1].split(',')[0])
  assert Checkpoints(str(workdir), 2).latest() == step
  assert start(workdir).wait() == 0
  assert exported(workdir) == whole[0]


def interrupted(monkeypatch, numbers, at=3):
  """Lets the run receive signals while it waits for the batch `at`."""
  plain = setup.make_loader

  def opened(*args):
    batches, count = plain(*args), 0

    class Signalling:
      position, seek, close = batches.position, batches.seek, batches.close

      def __next__(self):
        nonlocal count
        count += 1
        if count == at:
          for number in numbers:
            os.kill(os.getpid(), number)
        return next(batches)

    return Signalling()

  monkeypatch.setattr(setup, 'make_loader', opened)


@pytest.mark.parametrize(
  'number',
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_saves_the_step_and_leaves(
  base,  # noqa: F811
  tmp_path,
  monkeypatch,
  number,
):
  train.train(card(base), str(tmp_path / 'whole'))
  handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with monkeypatch.context() as patch:
    interrupted(patch, [number])
    with pytest.raises(Stopped, match=f'{number.name} after step 3') as e:
      train.train(card(base), str(tmp_path / 'cut'))
  assert e.value.code == 128 + number
  # Whoever called train has his handlers back.
  assert handlers == (
    signal.getsignal(signal.SIGTERM),
    signal.getsignal(signal.SIGINT),
  )
  assert Checkpoints(str(tmp_path / 'cut'), 2).latest() == 3
  train.train(card(base), str(tmp_path / 'cut'))
  assert adapter_bytes(tmp_path / 'whole') == adapter_bytes(tmp_path / 'cut')


@pytest.mark.slow
def test_a_signal_while_validating_or_saving_loses_no_step(
  base,  # noqa: F811
  tmp_path,
  monkeypatch,
):
  run = {'evaluation.every_steps': 1, 'checkpoint.every_steps': 2}
  places = (Evaluator, 'validation'), (Checkpoints, 'save')
  # Validated at step 1, which is then saved; saved at 2, so left after 3.
  for (owner, name), last in zip(places, (1, 3), strict=True):
    with monkeypatch.context() as patch:
      plain = getattr(owner, name)

      def signalling(*args, plain=plain):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

      patch.setattr(owner, name, signalling)
      with pytest.raises(Stopped, match=f'after step {last}, which is saved'):
        train.train(card(base, **run), str(tmp_path / name))
    assert Checkpoints(str(tmp_path / name), 2).latest() == last
    steps = [row['step'] for row in losses(tmp_path / name) if 'loss' in row]
    assert steps == list(range(1, last + 1))


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait(base, tmp_path, monkeypatch):  # noqa: F811
  interrupted(monkeypatch, [signal.SIGINT, signal.SIGINT])
  with pytest.raises(KeyboardInterrupt):
    train.train(card(base), str(tmp_path))
  # The checkpoint of step 2 is whole.
  assert Checkpoints(str(tmp_path), 2).latest() == 2


# ---- a run that stops by itself ----


def test_progress_counts_the_validations_since_the_best():
  progress = RunProgress()
  for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0), (4, 2.5)):
    progress = progress.after_validation(loss, step)
  assert (progress.best, progress.best_step, progress.waited) == (2.0, 2, 2)
  assert progress.is_patience_exhausted(
    2
  ) and not progress.is_patience_exhausted(3)
  assert not progress.is_patience_exhausted(0)


def judged(base, losses, monkeypatch, workdir, **changes):  # noqa: F811
  """A run whose validations give the losses."""
  given = iter(losses)
  monkeypatch.setattr(
    Evaluator, 'validation', lambda *_: {'validation_loss': next(given)}
  )
  config = card(base, **{'evaluation.every_steps': 1, **changes})
  train.train(config, str(workdir))
  rows = metrics_log.read(str(workdir / 'metrics.jsonl'))
  return [row['step'] for row in rows if 'validation_loss' in row]


@pytest.mark.slow
def test_patience_ends_a_run_and_it_stays_ended(
  base,  # noqa: F811
  tmp_path,
  monkeypatch,
  capsys,
):
  run = {'steps': 9, 'early_stopping_patience': 2}
  losses = [3.0, 2.0, 2.5, 2.25, 1.0]
  steps = judged(base, losses, monkeypatch, tmp_path, **run)
  assert steps == [1, 2, 3, 4]
  assert (
    'stopped at step 4: the validation loss was least, 2.0000, at step 2'
    in (capsys.readouterr().out)
  )
  assert Checkpoints(str(tmp_path), 2).latest() == 4
  assert judged(base, [0.5], monkeypatch, tmp_path, **run) == [1, 2, 3, 4]
  # More patience goes on from there.
  run['early_stopping_patience'] = 3
  assert judged(base, [9.0], monkeypatch, tmp_path, **run) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_beside_the_newest(
  base,  # noqa: F811
  tmp_path,
  monkeypatch,
):
  judged(
    base,
    [3.0, 2.0, 2.5, 2.25, 2.75, 2.5, 2.5],
    monkeypatch,
    tmp_path,
    **{'steps': 7, 'checkpoint.keep_best': True, 'checkpoint.max_to_keep': 1},
  )
  remaining = Checkpoints(str(tmp_path), None)
  assert sorted(p.name for p in pathlib.Path(remaining.path).iterdir()) == [
    '2',
    '7',
  ]
  assert remaining.restore_trainable('best')[1]['step'] == 2
  assert remaining.restore_trainable('')[1]['step'] == 7
  assert remaining.restore_trainable('7')[1]['step'] == 7
  with pytest.raises(ValueError, match="no checkpoint '5'; it has .* 2, 7"):
    remaining.restore_trainable('5')


@pytest.mark.slow
def test_an_edited_card_of_a_checkpoint_is_noticed(base, tmp_path):  # noqa: F811
  train.train(card(base), str(tmp_path))
  (path,) = (tmp_path / 'checkpoints' / '4' / 'card').glob('metadata')
  actual = json.loads(path.read_text())
  actual['course']['place'] = [[0, 1]]
  path.write_text(json.dumps(actual))
  with pytest.raises(ValueError, match='its metadata differ from their hash'):
    train.train(card(base), str(tmp_path))
