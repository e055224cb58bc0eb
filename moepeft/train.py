# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.train --config=configs/molora_t5.py --workdir=DIR

Pretraining, fine-tuning, preference tuning and adapters share this training
loop and differ in config, objective and callbacks. `moepeft.training.setup`
builds the parts, `moepeft.training.step` is the training step, and
`moepeft.training.callbacks` has logging, validation, checkpoints and others.
"""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from moepeft import library, registries
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.solve_method import with_explicit_method
from moepeft.config import check as config_check
from moepeft.config import command_line, imports
from moepeft.core import distributed, host_memory, sharding
from moepeft.core.disk import tell_full_disk
from moepeft.data import fingerprint
from moepeft.data.preference.tokenize import has_chat_template
from moepeft.data.readers import READERS
from moepeft.runs import before_after, diagnosis, trackers
from moepeft.runs.directory import Workdir, open_workdir
from moepeft.runs.resume import (
  check_same_data,
  check_unchanged,
  with_start_date,
  with_stored_method,
)
from moepeft.runs.run import Run
from moepeft.training import next_steps, setup
from moepeft.training.callbacks import Callback, build_callbacks
from moepeft.training.loop import Stopped, TrainingLoop
from moepeft.training.optimizers import SCHEDULES

_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'The directory of the run; an existing run is resumed. Default: '
  'workdirs/<name of the config>.',
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Build everything, do one step, write no file.'
)
_MAY_DIFFER = flags.DEFINE_list(
  'may_differ',
  [],
  'Config keys, like data.path, that may change when a run is resumed.',
)
_SKIP_DAMAGED = flags.DEFINE_bool(
  'skip_damaged',
  False,
  'Resume from the checkpoint before a damaged one, which is moved to '
  '<workdir>/damaged.',
)
_DISTRIBUTED = flags.DEFINE_string(
  'distributed',
  None,
  "Join the other processes of a run: 'auto' on a cluster that JAX knows (TPU, "
  "SLURM, ...), else 'HOST:PORT,PROCESSES,NUMBER of this one'.",
)

_DISTRIBUTED_TIMEOUT = flags.DEFINE_integer(
  'distributed_timeout',
  300,
  'Seconds that processes wait for each other at the start, and after which a '
  'process that does not answer counts as lost.',
  lower_bound=distributed.SHORTEST,
  upper_bound=distributed.LONGEST,
)


def train(
  config: ConfigDict,
  workdir: str,
  dry_run: bool = False,
  may_differ: Sequence[str] = (),
  gin: str = '',
  skip_damaged: bool = False,
) -> dict:
  """Trains and evaluates; returns the final summary.

  Args:
    config: a config in the form of `moepeft.config.defaults.default`.
    workdir: created if needed; an existing run is resumed.
    dry_run: whether to do one step only, without evaluation and files.
    may_differ: config keys that may differ from those of the resumed run; see
      `runs.resume.check_unchanged`.
    gin: the gin files of the config, joined; saved as config.gin.
    skip_damaged: whether to resume from the checkpoint before a damaged one.

  Raises:
    ValueError: the config, the data or the work directory is not usable.
    Stopped: a signal ended the run.
  """
  started = time.monotonic()
  config = check(config, workdir)
  callbacks = build_callbacks(config)
  if dry_run:
    return _dry_run(setup.build(config, workdir, dry_run=True))
  with (
    open_run(config, workdir, may_differ, gin, skip_damaged) as opened,
    contextlib.ExitStack() as exit_stack,
  ):
    training, loop = opened
    for callback in callbacks:
      exit_stack.callback(callback.close)
    run_loop(loop, callbacks)
    return end_run(training, loop, time.monotonic() - started)


def check(config: ConfigDict, workdir: str) -> ConfigDict:
  """Checks a config before any data is read; returns it with its method solved.

  Raises:
    ValueError: the config is not usable.
  """
  imports.import_modules(config.imports)
  config_check.check(config, registries.BY_KEY)
  config = with_stored_method(Run(workdir), config)
  config = base_lib.with_resolved_method(with_explicit_method(config))
  setup.check(config)
  return config


@contextlib.contextmanager
def open_run(
  config: ConfigDict,
  workdir: str,
  may_differ: Sequence[str] = (),
  gin: str = '',
  skip_damaged: bool = False,
  base: base_lib.Base | None = None,
) -> Iterator[tuple[setup.Training, TrainingLoop]]:
  """Locks a work directory, builds its run and restores it.

  Args:
    config: from `check`.
    base: as for `setup.build`.
  """
  run = Run(workdir)
  with (
    # Only the first process locks the directory and writes to it, except for
    # checkpoints, which all processes write.
    _lock(workdir) as lock,
    tell_full_disk(workdir, run.latest_step),
  ):
    config = with_start_date(run, config)
    schedule = SCHEDULES.lookup(config.optimizer.schedule)
    steps = () if schedule.depends_on_steps else ('steps',)
    check_unchanged(run, config, (*may_differ, *steps))
    data_hashes = fingerprint.data_hashes(config.data)
    check_same_data(run, data_hashes, may_differ)
    training = setup.build(config, workdir, base=base)
    yield (
      training,
      setup.start(training, run, lock, data_hashes, gin, skip_damaged),
    )


def run_loop(loop: TrainingLoop, callbacks: Sequence[Callback]) -> None:
  """Runs the remaining steps, with callbacks after each of them."""
  for callback in callbacks:
    callback.on_start(loop)
  # Release the memory of loading and evaluation.
  host_memory.trim()
  memory_bound = host_memory.Bound()
  if loop.step < loop.steps and not loop.stop_requested:
    loop.progress.phase('compiling the first step')
  while loop.step < loop.steps and not loop.stop_requested:
    batch = next(loop.batches)
    with jax.profiler.StepTraceAnnotation('train', step_num=loop.step + 1):
      loop.state, metrics = loop.train_step(
        loop.state, sharding.shard_batch(loop.mesh, batch)
      )
    loop.step += 1
    if loop.step == loop.first_step + 1:
      jax.block_until_ready(loop.state)
      memory_bound.begin()
    memory_bound.check()
    if loop.workdir:
      loop.workdir.check()
    for callback in callbacks:
      callback.on_step(loop, batch, metrics)
  finish_loop(loop, callbacks)


def finish_loop(loop: TrainingLoop, callbacks: Sequence[Callback]) -> None:
  """Ends a loop after its last step."""
  loop.progress.close()
  loop.batches.close()
  for callback in callbacks:
    callback.on_end(loop)


def end_run(
  training: setup.Training, loop: TrainingLoop, seconds: float
) -> dict:
  """Closes a run's files, and writes and prints its summary.

  Raises:
    Stopped: a signal ended the loop.
  """
  for tracker in loop.trackers:
    tracker.close()
  if loop.signal:
    raise Stopped(loop.signal, loop.step, loop.checkpoints.path)
  return _summarize(training, loop, seconds)


def _lock(workdir: str) -> contextlib.AbstractContextManager[Workdir | None]:
  return (
    open_workdir(workdir) if distributed.first() else contextlib.nullcontext()
  )


def _dry_run(training: setup.Training) -> dict:
  """Does one step and writes no file."""
  batch = sharding.shard_batch(training.layout.mesh, next(training.batches))
  _, metrics = training.train_step(training.state, batch)
  loss = float(metrics['loss'])
  print(f'dry run: one step, loss {loss:.4f}; no file written')
  return {'loss': loss}


def _summarize(
  training: setup.Training, loop: TrainingLoop, seconds: float
) -> dict:
  """Writes and prints the summary of a run, with paths and next commands."""
  config, method, run = training.config, training.method, loop.run
  summary = {'method': method.method, 'semantics': method.semantics}
  changes: list[str] = []
  if loop.after:
    summary |= {'before': loop.before, 'after': loop.after}
    changes = before_after.describe_changes(loop.before, loop.after)
  summary['parameters'] = training.parameters
  summary['seconds'] = round(seconds, 1)
  distributed.write_json(run.summary_file, summary)
  is_chat = READERS[config.data.source].uses_chat_template and (
    bool(config.data.chat_template) or has_chat_template(training.tokenizer)
  )
  example = training.example
  prompt = (example.inputs, example.task) if example else ()
  next_steps.print_next_steps(
    summary,
    changes,
    diagnosis.findings(pathlib.Path(run.path)),
    {
      'losses': run.metrics_file,
      'plots': run.plots_dir if config.log.plots else None,
      'curves': trackers.view_commands(config.log.trackers, run.path),
      'evaluation': run.after_file if loop.after else None,
      'checkpoints': run.checkpoints_dir,
      **next_steps.commands(run.path, config, method, is_chat, *prompt),
    },
  )
  return summary


def fit(config: ConfigDict, workdir: str) -> library.Model:
  """Trains with a config, `moepeft.fit`, and returns the trained model.

  Args:
    workdir: the directory of the run; an existing run is resumed.

  Raises:
    ValueError: the config, the data or the work directory is not usable.
  """
  train(config, workdir)
  return library.load(workdir)


def main(argv) -> None:
  del argv
  workdir = _WORKDIR.value
  if workdir is None:
    flag = flags.FLAGS['config'].config_filename
    name = os.path.basename(flag.partition(':')[0]).removesuffix('.py')
    workdir = os.path.join('workdirs', name)
  workdir = os.path.expanduser(workdir)
  try:
    if _DISTRIBUTED.value:
      distributed.join(_DISTRIBUTED.value, _DISTRIBUTED_TIMEOUT.value)
    may_differ, gin = _MAY_DIFFER.value, command_line.gin_text()
    dry_run, skip_damaged = _DRY_RUN.value, _SKIP_DAMAGED.value
    with distributed.exit_on_error(_DISTRIBUTED_TIMEOUT.value):
      train(_CONFIG.value, workdir, dry_run, may_differ, gin, skip_damaged)
  except Stopped as e:
    print(f'\n{e}', file=sys.stderr)
    sys.exit(e.code)
  except KeyboardInterrupt:
    print(
      f'\nstopped; the same command goes on from the latest checkpoint in '
      f'{workdir}/checkpoints, if there is one',
      file=sys.stderr,
    )
    sys.exit(130)


if __name__ == '__main__':
  _CONFIG = command_line.define_config('configs/molora_t5.py')
  command_line.run(main)
