# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: the arrays that training changes, and metadata.

A checkpoint holds the trainable collection, the optimizer's state, the step
and the rng; the base is named by its path and content hash. Orbax does not
notice every flipped bit, so the metadata ('card' on disk) has a checksum of
each array and a hash of itself. Arrays are written by the devices' hosts, each
its shards, while training goes on.
"""

import contextlib
import dataclasses
import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from moepeft.checkpoints import orbax_output, run_metadata
from moepeft.checkpoints.checksums import checksums
from moepeft.checkpoints.run_metadata import seal
from moepeft.checkpoints.run_progress import RunProgress
from moepeft.checkpoints.state_arrays import (
  abstract_arrays,
  array_shapes,
  host_template,
  state_parts,
  without_alias,
)
from moepeft.config import renamed
from moepeft.core import distributed, files
from moepeft.core.disk import tell_full_disk
from moepeft.core.memory import is_out_of_memory
from moepeft.core.types import State, Tree
from moepeft.models.weight_mapping import check_finite
from moepeft.runs.run import Run

_BEGINNING = RunProgress()
# Characters of a library's message that a sentence quotes.
_QUOTED = 160


class DamagedCheckpoint(ValueError):
  """A checkpoint that cannot be read, or is not what was written."""


class _NewestAndBest(PreservationPolicy):
  """Keeps the newest few, all where `newest` is None, and the best."""

  def __init__(self, newest: int | None):
    self._newest = newest
    self.step: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context) -> list:
    del context
    newest = {c.step for c in checkpoints[-(self._newest or 0) :]}
    return [c.step in newest or c.step == self.step for c in checkpoints]


def _check_metadata(path: str) -> None:
  """Checks the files that Orbax reads of every checkpoint when it opens them.

  Orbax goes on without one that is no JSON.

  Raises:
    DamagedCheckpoint: one is no regular file, or is JSON of too many levels.
  """
  for file in glob.glob(f'{glob.escape(path)}/*/_CHECKPOINT_METADATA'):
    try:
      with files.open_file(file) as opened:
        json.loads(opened.read())
    except (files.NotAFile, RecursionError) as error:
      reason = str(error).splitlines()[0]
      raise DamagedCheckpoint(
        f'the checkpoint {os.path.dirname(file)} is damaged ({file}: '
        f'{reason}); move it away to go on from the one before it'
      ) from None
    except (OSError, ValueError):
      pass


class Checkpoints:
  """The checkpoints below a work directory, the newest few kept."""

  def __init__(
    self,
    workdir: str,
    keep: int | None,
    best: bool = False,
    asynchronous: bool = False,
  ):
    """
    Args:
      keep: how many of the newest are kept; None for all.
      best: whether that of the least validation loss is kept too.
      asynchronous: whether `save` returns while threads still write. Errors
        of these are raised by the next `check`, `save` or `wait`.
    """
    path = os.path.abspath(Run(workdir).checkpoints_dir)
    self._preservation, self._keep_best = _NewestAndBest(keep), best
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._preservation,
      enable_async_checkpointing=True,
      create=True,
    )
    self.path, self._options = path, options
    self._asynchronous = asynchronous
    # The step that is being written, and the filter of the writers' output.
    self._saving: int | None = None
    self._output = contextlib.ExitStack()
    _check_metadata(path)
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self.path,
      options=self._options,
      item_handlers={
        'trainable': ocp.StandardCheckpointHandler(),
        'rest': ocp.StandardCheckpointHandler(),
        'card': ocp.JsonCheckpointHandler(),
      },
    )

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(
    self,
    state: State,
    described: dict[str, Any],
    progress: RunProgress = _BEGINNING,
  ) -> None:
    """Writes the checkpoint of `state.step`; all of it or nothing.

    Its arrays are the same however the state is sharded; all processes must
    call it. The state's buffers may be donated as soon as it returns.

    Raises:
      ValueError: the disk is full; the checkpoints before are whole.
    """
    self.wait()
    if self._keep_best:
      self._preservation.step = progress.best_step
    step = int(state.step)
    parts = state_parts(state)
    written = described | {
      'checksums': checksums(parts),
      'step': step,
      'course': dataclasses.asdict(progress),
    }
    parts = jax.tree.map(without_alias, parts)
    args = ocp.args.Composite(
      trainable=ocp.args.StandardSave(parts['trainable']),
      rest=ocp.args.StandardSave(parts['rest']),
      card=ocp.args.JsonSave(written | {'sha256': seal(written)}),
    )
    self._saving = step
    self._output.enter_context(orbax_output.quiet())
    with self._cleanup(step):
      self._manager.save(step, args=args)
    if not self._asynchronous:
      self.wait()

  def check(self) -> None:
    """Raises the error of a save that has failed since; call it every step.

    Raises:
      ValueError: the disk is full; the checkpoints before are whole.
    """
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns when the last save is on the disk.

    Raises:
      ValueError: the disk is full; the checkpoints before are whole.
    """
    if self._saving is None:
      return
    with self._cleanup(self._saving):
      self._manager.wait_until_finished()
    self._saving = None
    self._output.close()

  @contextlib.contextmanager
  def _cleanup(self, step: int) -> Iterator[None]:
    """Removes half a checkpoint where writing it fails."""
    with tell_full_disk(self.path, self.latest):
      try:
        yield
      except Exception as error:
        self._saving = None
        self._give_up(step)
        self._output.__exit__(type(error), error, error.__traceback__)
        raise

  def _give_up(self, step: int) -> None:
    """Removes half a checkpoint: it counts as none, its space is wanted."""
    half = f'{glob.escape(self.path)}/{step}.orbax-*-tmp*'
    # Of Orbax's threads one has failed, and others still write for a while.
    empty_looks = 0
    for _ in range(50):
      paths = glob.glob(half)
      empty_looks = 0 if paths else empty_looks + 1
      if empty_looks == 3:
        break
      for path in paths:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.1)
    # It counted as one while it was written.
    self._manager.reload()

  def restore(
    self,
    state: State,
    described: Mapping[str, Any],
    skip_damaged: bool = False,
  ) -> State:
    """The latest checkpoint in the place of a fresh state, spread as that is.

    Args:
      skip_damaged: a checkpoint that is damaged is moved to <workdir>/damaged,
        and the one before it is read. All processes must find the same.

    Raises:
      ValueError: it belongs to another run.
      DamagedCheckpoint: it is damaged, and with `skip_damaged` none is whole.
    """
    while True:
      step = self.latest()
      try:
        return self._restored(step, state, described)
      except DamagedCheckpoint as e:
        if not skip_damaged or not self._before(step):
          raise
        print(f'skipped: {e}', file=sys.stderr)
        print(f'moved it to {self._set_aside(step)}', file=sys.stderr)

  def _restored(
    self, step: int, state: State, described: Mapping[str, Any]
  ) -> State:
    read = self._metadata(step)
    run_metadata.check_same_run(self.path, read, described)
    try:
      restored = self._restore(
        step,
        **{
          name: ocp.args.StandardRestore(abstract_arrays(tree))
          for name, tree in state_parts(state).items()
        },
      )
    except DamagedCheckpoint:
      self._check_fits(step, read, state)
      raise
    parts = {name: restored[name] for name in ('trainable', 'rest')}
    self._verify(step, parts, read)
    rest = parts['rest']
    return state.replace(
      trainable=parts['trainable'],
      opt=rest['opt'],
      step=rest['step'],
      rng=jax.random.wrap_key_data(rest['rng']),
    )

  def _check_fits(
    self, step: int, read: Mapping[str, Any], state: State
  ) -> None:
    """Distinguishes a config that has changed from damage.

    Raises:
      ValueError: the checkpoint is whole as it lies there, and its arrays are
        not those of the config's state.
    """
    try:
      parts = self._restore_on_host(step, 'trainable', 'rest')
      self._verify(step, parts, read)
    except DamagedCheckpoint:
      return
    if array_shapes(parts) != array_shapes(state_parts(state)):
      raise ValueError(
        f'the checkpoint {self.path}/{step} is whole, but its arrays are not '
        "those of this config (another optimizer?); set the run's config "
        'back, or choose another --workdir'
      )

  def run_progress(self) -> RunProgress:
    """The run's progress at the latest checkpoint."""
    return run_metadata.run_progress(self._metadata(self.latest()))

  def restore_trainable(
    self, selection: str = ''
  ) -> tuple[Tree, dict[str, Any]]:
    """The trainable collection of a checkpoint, and its metadata.

    Args:
      selection: '' for the latest, 'best' for that of the least validation
        loss, or the number of its step.

    Raises:
      ValueError: there is no such checkpoint.
      DamagedCheckpoint: it is damaged.
      CheckpointError: an array holds NaN or infinity, as the last update of a
        run that diverges may leave it.
    """
    step = self._find(selection)
    read = self._metadata(step)
    parts = self._restore_on_host(step, 'trainable')
    self._verify(step, parts, read)
    trainable = parts['trainable']
    for path, array in jax.tree_util.tree_leaves_with_path(trainable):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      check_finite(name, array, f'the checkpoint of step {step} in {self.path}')
    return trainable, read

  def _find(self, selection: str) -> int:
    step, steps = self.latest(), self._steps()
    if step is None:
      raise ValueError(f'{self.path} holds no checkpoint; train first')
    if selection == 'best':
      step = self.run_progress().best_step
    elif selection:
      step = (
        int(selection) if selection.isdecimal() and len(selection) < 19 else -1
      )
    if step not in steps:
      raise ValueError(
        f'{self.path} holds no checkpoint {selection!r}; it has those of the '
        f'steps {", ".join(map(str, steps))} (best: train with '
        'config.checkpoint.keep_best=True)'
      )
    return step

  def _steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def _before(self, step: int) -> list[int]:
    return [earlier for earlier in self._steps() if earlier < step]

  def _set_aside(self, step: int) -> str:
    """Moves a checkpoint out of the way; returns its new path."""
    folder = Run(os.path.dirname(self.path)).damaged_dir
    target, number = os.path.join(folder, str(step)), 1
    while os.path.lexists(target):
      target, number = os.path.join(folder, f'{step}.{number}'), number + 1
    # Nobody moves it while another process still reads it.
    distributed.agree(True, True)
    if distributed.first():
      os.makedirs(folder, exist_ok=True)
      os.rename(os.path.join(self.path, str(step)), target)
    distributed.agree(True, True)
    self._manager = self._open()
    return target

  def _metadata(self, step: int) -> dict[str, Any]:
    read = self._restore(step, card=ocp.args.JsonRestore())['card']
    try:
      run_metadata.check(read)
    except ValueError as e:
      raise self._damaged(step, str(e)) from None
    return read | {'method': renamed.translate_method(read['method'])}

  def _restore_on_host(self, step: int, *names: str) -> dict[str, Tree]:
    """Whole arrays of NumPy, whatever devices they were saved from."""

    def templates() -> dict[str, Any]:
      metadata = self._manager.item_metadata(step)
      return {
        name: ocp.args.StandardRestore(
          jax.tree.map(host_template, metadata[name].tree)
        )
        for name in names
      }

    restored = self._guarded(
      step,
      lambda: self._manager.restore(
        step, args=ocp.args.Composite(**templates())
      ),
    )
    return {name: restored[name] for name in names}

  def _restore(self, step: int, **items) -> Any:
    return self._guarded(
      step,
      lambda: self._manager.restore(step, args=ocp.args.Composite(**items)),
    )

  def _guarded(self, step: int, read: Callable[[], Any]) -> Any:
    """Calls a function that reads a checkpoint.

    Raises:
      DamagedCheckpoint: Orbax cannot read it.
    """
    folder = os.path.join(self.path, str(step))
    try:
      for parent, _, file_names in os.walk(folder):
        for name in file_names:
          files.check_file(os.path.join(parent, name))
      with orbax_output.quiet():
        return read()
    except Exception as e:
      # Orbax and TensorStore raise many types at damaged bytes.
      if is_out_of_memory(e) or isinstance(e, PermissionError):
        raise
      # TensorStore's own error says more than what Orbax wraps it in.
      error = e.__cause__ or e
      reason = (str(error).splitlines() or [''])[0] or type(error).__name__
      if len(reason) > _QUOTED:
        reason = f'{reason[:_QUOTED]}...'
      raise self._damaged(step, f'it cannot be read ({reason})') from e

  def _verify(self, step: int, parts: Tree, read: Mapping[str, Any]) -> None:
    try:
      run_metadata.verify(parts, read)
    except ValueError as e:
      raise self._damaged(step, str(e)) from None

  def _damaged(self, step: int, reason: str) -> DamagedCheckpoint:
    before = self._before(step)
    if step != self.latest():
      other_steps = ', '.join(str(s) for s in self._steps() if s != step)
      advice = f'name another of its steps: {other_steps}'
    elif before:
      advice = (
        f'add --skip_damaged to moepeft.train to go on from step {before[-1]}, '
        f'which evaluate and generate read by --checkpoint={before[-1]}'
      )
    else:
      advice = 'there is none before it: begin anew in another --workdir'
    return DamagedCheckpoint(
      f'the checkpoint {self.path}/{step} is damaged: {reason}; {advice}'
    )
