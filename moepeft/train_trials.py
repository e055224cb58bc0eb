# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.train_trials --grid=... --sweep=DIR --trials=0,3,5

Trains trials of a sweep in one process by one vmapped step; `--vmap` of
moepeft.sweep starts it. Each trial has the run directory, the log and the end
that moepeft.train gives it; one that fails does not end the others.
"""

import contextlib
import dataclasses
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags

from moepeft import train
from moepeft.checkpoints import base as base_lib
from moepeft.config import command_line, program
from moepeft.core import host_memory
from moepeft.core.memory import is_out_of_memory
from moepeft.core.types import Batch
from moepeft.sweeps import grid as grid_lib
from moepeft.sweeps.directory import SweepDirectory
from moepeft.sweeps.trials import Trial, make_trials
from moepeft.training import setup
from moepeft.training.callbacks import Callback, build_callbacks
from moepeft.training.loop import Stopped
from moepeft.training.vmapped import RowLoop, VmappedStep


class TrialRun:
  """A trial while it is trained with others.

  Attributes:
    training, loop, callbacks: as `moepeft.train` has them.
    stack: what is closed when the trial ends.
    batch: of the last step.
    is_active: whether it neither ended nor failed.
    code: that a process of this trial alone would exit with.
  """

  training: setup.Training
  loop: RowLoop
  callbacks: list[Callback]

  def __init__(self, trial: Trial, directory: SweepDirectory):
    self.trial, self.workdir = trial, directory.run(trial).path
    self.batch: Batch | None = None
    self.is_active, self.code = True, 0
    self.stack = contextlib.ExitStack()
    self._log_file = directory.log_file(trial)

  @contextlib.contextmanager
  def reporting(self) -> Iterator[None]:
    """Writes the block's output, and the error that ends the trial, to its log.

    Errors of the process, such as Ctrl-C, propagate.
    """
    with (
      open(self._log_file, 'a', errors='backslashreplace') as log,
      contextlib.redirect_stdout(log),
      contextlib.redirect_stderr(log),
    ):
      try:
        with self._closing_at_errors():
          yield
      except Stopped as e:
        print(e, file=sys.stderr)
        self.code = e.code
      except Exception as e:
        message = command_line.error_message(e)
        if message is None:
          traceback.print_exc()
          message = f'{type(e).__name__}: {e}'
        command_line.print_error(message)
        self.code = 2

  @contextlib.contextmanager
  def _closing_at_errors(self) -> Iterator[None]:
    try:
      yield
    except Exception:
      self.is_active = False
      # What the run is in may replace its error, as that of a full disk.
      if not self.stack.__exit__(*sys.exc_info()):
        raise

  def open(
    self,
    base: base_lib.Base,
    first: setup.Training | None,
    of_process: dict[type, Callback],
    gin: str,
  ) -> None:
    """Builds and restores the run.

    Args:
      base: of all trials.
      first: the trial whose compiled programs are used; None for this one.
      of_process: callbacks that all trials share, by type; this one's are
        added.
      gin: as for `train.train`.
    """
    config = train.check(self.trial.config, self.workdir)
    self.callbacks = [
      of_process.setdefault(type(c), c) if c.is_of_process else c
      for c in build_callbacks(config)
    ]
    self.training, loop = self.stack.enter_context(
      train.open_run(config, self.workdir, gin=gin, base=base)
    )
    _check(self.training)
    self.loop = RowLoop(**vars(loop))
    if first is not None:
      self.training.evaluator.share_programs(first.evaluator)
      if self.training.task_routing:
        self.training.task_routing.share_programs(first.task_routing)
    for callback in self.callbacks:
      if not callback.is_of_process:
        self.stack.callback(callback.close)

  def start(self) -> None:
    for callback in self.callbacks:
      callback.on_start(self.loop)
    if self.has_steps:
      self.loop.progress.phase('compiling the first step of all trials')

  @property
  def has_steps(self) -> bool:
    return self.loop.step < self.loop.steps and not self.loop.stop_requested

  def after_step(self, metrics: dict) -> None:
    loop = self.loop
    loop.step += 1
    if loop.workdir:
      loop.workdir.check()
    for callback in self.callbacks:
      callback.on_step(loop, self.batch, metrics)

  def end(self, seconds: float) -> None:
    """Evaluates the trained run, and writes its summary."""
    self.is_active = False
    train.finish_loop(self.loop, self.callbacks)
    train.end_run(self.training, self.loop, seconds)
    self.stack.close()


def train_together(
  trials: Sequence[Trial], directory: SweepDirectory, gin: str = ''
) -> list[int]:
  """Trains trials by one step; returns the exit codes of their runs.

  Raises:
    ValueError: their steps are not one program, or cannot share a base.
  """
  started = time.monotonic()
  if len({program.fingerprint(trial.config) for trial in trials}) > 1:
    names = ', '.join(trial.name for trial in trials)
    raise ValueError(
      f'{names} differ in more than the seed, rates and weights of losses; '
      'train them one by one'
    )
  runs = [TrialRun(trial, directory) for trial in trials]
  of_process: dict[type, Callback] = {}
  with contextlib.ExitStack() as exit_stack:
    for run in runs:
      exit_stack.enter_context(run.stack)
    _open(runs, of_process, gin)
    for callback in of_process.values():
      exit_stack.callback(callback.close)
    for run in _active(runs):
      with run.reporting():
        run.start()
    host_memory.trim()
    _train(runs, started)
  return [run.code for run in runs]


def _open(
  runs: Sequence[TrialRun], of_process: dict[type, Callback], gin: str
) -> None:
  base = base_lib.load(runs[0].trial.config.model)
  first: setup.Training | None = None
  for run in runs:
    with run.reporting():
      run.open(base, first, of_process, gin)
      if first is None:
        first = run.training
        # Later trials take the arrays that are on the device.
        base = dataclasses.replace(base, params=first.state.frozen)


def _check(training: setup.Training) -> None:
  """Refuses what one vmapped step cannot train.

  Raises:
    ValueError: the message says why.
  """
  devices = training.layout.mesh.size
  if devices > 1:
    raise ValueError(
      f'--vmap trains on one device, and there are {devices}; leave it out, '
      'or show the process one device, as CUDA_VISIBLE_DEVICES=0 does'
    )
  if training.method.trainable != 'peft':
    raise ValueError(
      f'{training.method.method} trains the base, which trials of --vmap '
      'share; leave out --vmap'
    )


def _train(runs: Sequence[TrialRun], started: float) -> None:
  """Does the remaining steps of all trials, and ends each after its last."""
  rows = [run for run in _active(runs) if run.has_steps]
  _end_finished(runs, started)
  if not rows:
    return
  step = VmappedStep(
    rows[0].training.make_step,
    [run.training.config for run in rows],
    [run.loop.state for run in rows],
  )
  memory_bound = host_memory.Bound()
  is_first = True
  while active := _active(rows):
    for run in active:
      with run.reporting():
        run.batch = next(run.loop.batches)
    batches = [run.batch for run in rows if run.batch is not None]
    if not batches:
      break
    # A trial that has ended, or never had a batch, computes with another's.
    metrics = step([batches[0] if r.batch is None else r.batch for r in rows])
    for i, run in enumerate(rows):
      if run.is_active:
        run.loop.follow(lambda i=i: step.state(i))
    if is_first:
      np.asarray(metrics[0]['loss'])
      memory_bound.begin()
      is_first = False
    memory_bound.check()
    for run, run_metrics in zip(rows, metrics, strict=True):
      if run.is_active:
        with run.reporting():
          run.after_step(run_metrics)
    _end_finished(rows, started)


def _end_finished(runs: Sequence[TrialRun], started: float) -> None:
  for run in _active(runs):
    if not run.has_steps:
      with run.reporting():
        run.end(time.monotonic() - started)


def _active(runs: Sequence[TrialRun]) -> list[TrialRun]:
  return [run for run in runs if run.is_active]


def main(argv) -> None:
  del argv
  grid = grid_lib.of_flags(_GRID.value, command_line.config_file())
  trials = make_trials(_CONFIG.value, grid)
  indices = [int(index) for index in _TRIALS.value]
  if not indices or not all(0 <= i < len(trials) for i in indices):
    raise ValueError(
      f'--trials names trials of the grid, from 0 to {len(trials) - 1}; got '
      f'{",".join(_TRIALS.value)!r}'
    )
  directory = SweepDirectory(_SWEEP.value)
  directory.prepare(_CONFIG.value)
  try:
    codes = train_together(
      [trials[i] for i in indices], directory, command_line.gin_text()
    )
  except Exception as e:
    if not is_out_of_memory(e):
      raise
    raise ValueError(
      f'memory ran out with {len(indices)} trials in one program; lower --vmap'
    ) from e
  sys.exit(next(filter(None, codes), 0))


if __name__ == '__main__':
  _CONFIG = command_line.define_config('configs/molora_t5.py')
  _GRID = flags.DEFINE_string('grid', '', 'As of moepeft.sweep.')
  _SWEEP = flags.DEFINE_string('sweep', '', 'The directory of the sweep.')
  _TRIALS = flags.DEFINE_list('trials', [], 'The indices of the trials.')
  command_line.run(main)
