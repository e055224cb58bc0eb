# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: the arrays that training changes and metadata.

A checkpoint has the trainable collection, the optimizer state, the step, the
rng, and the path and content hash of the base. Orbax does not detect every
flipped bit, so the metadata ('card' on disk) has a checksum of each array and a
hash of itself. Each host writes its devices' shards while training continues.
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
from moepeft.checkpoints.run_metadata import metadata_hash
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

_NO_PROGRESS = RunProgress()
# The longest part, in characters, of a library's message in an error.
_MAX_REASON = 160


class DamagedCheckpoint(ValueError):
  """A checkpoint cannot be read, or differs from its checksums."""


class _NewestAndBest(PreservationPolicy):
  """Keeps the `newest` latest checkpoints (None: all) and the best one."""

  def __init__(self, newest: int | None):
    self._newest = newest
    self.best_step: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context) -> list:
    del context
    newest = {c.step for c in checkpoints[-(self._newest or 0) :]}
    return [c.step in newest or c.step == self.best_step for c in checkpoints]


def _check_orbax_metadata(path: str) -> None:
  """Checks the metadata files that Orbax reads when it opens the directory.

  Orbax ignores a file that is not JSON.

  Raises:
    DamagedCheckpoint: a file is not regular, or is too deeply nested JSON.
  """
  for file in glob.glob(f'{glob.escape(path)}/*/_CHECKPOINT_METADATA'):
    try:
      with files.open_file(file) as metadata:
        json.loads(metadata.read())
    except (files.NotAFile, RecursionError) as error:
      reason = str(error).splitlines()[0]
      raise DamagedCheckpoint(
        f'the checkpoint {os.path.dirname(file)} is damaged ({file}: '
        f'{reason}); move it away to resume from the one before it'
      ) from None
    except (OSError, ValueError):
      pass


class Checkpoints:
  """The checkpoints of a work directory."""

  def __init__(
    self,
    workdir: str,
    keep: int | None,
    best: bool = False,
    asynchronous: bool = False,
  ):
    """
    Args:
      keep: the number of latest checkpoints to keep; None for all.
      best: whether to keep the checkpoint of the best validation loss, too.
      asynchronous: whether `save` returns while threads still write. The next
        `check`, `save` or `wait` raises their errors.
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
    # The step that is being written, and the filter of the threads' output.
    self._saving_step: int | None = None
    self._output = contextlib.ExitStack()
    _check_orbax_metadata(path)
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
    identity: dict[str, Any],
    progress: RunProgress = _NO_PROGRESS,
  ) -> None:
    """Writes the checkpoint of `state.step` atomically.

    All processes must call it. The files do not depend on the sharding. The
    state's buffers may be donated after it returns.

    Raises:
      ValueError: the disk is full; the checkpoints before are whole.
    """
    self.wait()
    if self._keep_best:
      self._preservation.best_step = progress.best_step
    step = int(state.step)
    parts = state_parts(state)
    metadata = identity | {
      'checksums': checksums(parts),
      'step': step,
      'course': dataclasses.asdict(progress),
    }
    parts = jax.tree.map(without_alias, parts)
    args = ocp.args.Composite(
      trainable=ocp.args.StandardSave(parts['trainable']),
      rest=ocp.args.StandardSave(parts['rest']),
      card=ocp.args.JsonSave(metadata | {'sha256': metadata_hash(metadata)}),
    )
    self._saving_step = step
    self._output.enter_context(orbax_output.suppress_tracebacks())
    with self._cleanup(step):
      self._manager.save(step, args=args)
    if not self._asynchronous:
      self.wait()

  def check(self) -> None:
    """Raises the error of a failed asynchronous save; call it every step.

    Raises:
      ValueError: the disk is full; the checkpoints before are whole.
    """
    if (
      self._saving_step is not None
      and not self._manager.is_saving_in_progress()
    ):
      self.wait()

  def wait(self) -> None:
    """Waits until the last save is on the disk.

    Raises:
      ValueError: the disk is full; the checkpoints before are whole.
    """
    if self._saving_step is None:
      return
    with self._cleanup(self._saving_step):
      self._manager.wait_until_finished()
    self._saving_step = None
    self._output.close()

  @contextlib.contextmanager
  def _cleanup(self, step: int) -> Iterator[None]:
    """Removes a partial checkpoint if its write fails."""
    with tell_full_disk(self.path, self.latest):
      try:
        yield
      except Exception as error:
        self._saving_step = None
        self._remove_partial(step)
        self._output.__exit__(type(error), error, error.__traceback__)
        raise

  def _remove_partial(self, step: int) -> None:
    """Removes a partial checkpoint to free its disk space."""
    pattern = f'{glob.escape(self.path)}/{step}.orbax-*-tmp*'
    # After one of Orbax's threads fails, others still write for a while.
    empty_polls = 0
    for _ in range(50):
      paths = glob.glob(pattern)
      empty_polls = 0 if paths else empty_polls + 1
      if empty_polls == 3:
        break
      for path in paths:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.1)
    # Orbax counts a checkpoint from the start of its write.
    self._manager.reload()

  def restore(
    self,
    state: State,
    identity: Mapping[str, Any],
    skip_damaged: bool = False,
  ) -> State:
    """Restores the latest checkpoint.

    Args:
      state: the initial state; the result has its shardings.
      skip_damaged: whether to move a damaged checkpoint to <workdir>/damaged
        and to read the one before it. All processes must see the same files.

    Raises:
      ValueError: the checkpoint belongs to another run.
      DamagedCheckpoint: it is damaged; with `skip_damaged`, all of them are.
    """
    while True:
      step = self.latest()
      try:
        return self._restore_state(step, state, identity)
      except DamagedCheckpoint as e:
        if not skip_damaged or not self._earlier_steps(step):
          raise
        print(f'skipped: {e}', file=sys.stderr)
        print(f'moved it to {self._move_damaged(step)}', file=sys.stderr)

  def _restore_state(
    self, step: int, state: State, identity: Mapping[str, Any]
  ) -> State:
    metadata = self._read_metadata(step)
    run_metadata.check_same_run(self.path, metadata, identity)
    try:
      restored = self._restore_items(
        step,
        **{
          name: ocp.args.StandardRestore(abstract_arrays(tree))
          for name, tree in state_parts(state).items()
        },
      )
    except DamagedCheckpoint:
      self._check_state_arrays(step, metadata, state)
      raise
    parts = {name: restored[name] for name in ('trainable', 'rest')}
    self._verify(step, parts, metadata)
    rest = parts['rest']
    return state.replace(
      trainable=parts['trainable'],
      opt=rest['opt'],
      step=rest['step'],
      rng=jax.random.wrap_key_data(rest['rng']),
    )

  def _check_state_arrays(
    self, step: int, metadata: Mapping[str, Any], state: State
  ) -> None:
    """Distinguishes a changed config from a damaged checkpoint.

    Raises:
      ValueError: the checkpoint is not damaged, but its arrays differ from the
        state's in name, shape or dtype.
    """
    try:
      parts = self._restore_on_host(step, 'trainable', 'rest')
      self._verify(step, parts, metadata)
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
    return run_metadata.run_progress(self._read_metadata(self.latest()))

  def restore_trainable(
    self, selection: str = ''
  ) -> tuple[Tree, dict[str, Any]]:
    """(trainable collection, metadata) of a checkpoint.

    Args:
      selection: '' for the latest, 'best' for that of the best validation loss,
        or the number of a step.

    Raises:
      ValueError: there is no such checkpoint.
      DamagedCheckpoint: it is damaged.
      CheckpointError: an array has NaN or infinity, as in a diverged run.
    """
    step = self._select_step(selection)
    metadata = self._read_metadata(step)
    parts = self._restore_on_host(step, 'trainable')
    self._verify(step, parts, metadata)
    trainable = parts['trainable']
    for path, array in jax.tree_util.tree_leaves_with_path(trainable):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      check_finite(name, array, f'the checkpoint of step {step} in {self.path}')
    return trainable, metadata

  def _select_step(self, selection: str) -> int:
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

  def _earlier_steps(self, step: int) -> list[int]:
    return [earlier for earlier in self._steps() if earlier < step]

  def _move_damaged(self, step: int) -> str:
    """Moves a damaged checkpoint; returns its new path."""
    folder = Run(os.path.dirname(self.path)).damaged_dir
    target, number = os.path.join(folder, str(step)), 1
    while os.path.lexists(target):
      target, number = os.path.join(folder, f'{step}.{number}'), number + 1
    # Wait until no process reads the checkpoint.
    distributed.agree(True, True)
    if distributed.first():
      os.makedirs(folder, exist_ok=True)
      os.rename(os.path.join(self.path, str(step)), target)
    distributed.agree(True, True)
    self._manager = self._open()
    return target

  def _read_metadata(self, step: int) -> dict[str, Any]:
    metadata = self._restore_items(step, card=ocp.args.JsonRestore())['card']
    try:
      run_metadata.check(metadata)
    except ValueError as e:
      raise self._damage_error(step, str(e)) from None
    method = renamed.translate_method(metadata['method'])
    return metadata | {'method': method}

  def _restore_on_host(self, step: int, *names: str) -> dict[str, Tree]:
    """Restores unsharded NumPy arrays, independent of the saved sharding."""

    def templates() -> dict[str, Any]:
      metadata = self._manager.item_metadata(step)
      return {
        name: ocp.args.StandardRestore(
          jax.tree.map(host_template, metadata[name].tree)
        )
        for name in names
      }

    restored = self._read_or_raise(
      step,
      lambda: self._manager.restore(
        step, args=ocp.args.Composite(**templates())
      ),
    )
    return {name: restored[name] for name in names}

  def _restore_items(self, step: int, **items) -> Any:
    return self._read_or_raise(
      step,
      lambda: self._manager.restore(step, args=ocp.args.Composite(**items)),
    )

  def _read_or_raise(self, step: int, read: Callable[[], Any]) -> Any:
    """Calls a function that reads a checkpoint.

    Raises:
      DamagedCheckpoint: Orbax cannot read it.
    """
    folder = os.path.join(self.path, str(step))
    try:
      for parent, _, file_names in os.walk(folder):
        for name in file_names:
          files.check_file(os.path.join(parent, name))
      with orbax_output.suppress_tracebacks():
        return read()
    except Exception as e:
      # Orbax and TensorStore raise many exception types for damaged files.
      if is_out_of_memory(e) or isinstance(e, PermissionError):
        raise
      # The cause is TensorStore's error, which is more specific.
      error = e.__cause__ or e
      reason = (str(error).splitlines() or [''])[0] or type(error).__name__
      if len(reason) > _MAX_REASON:
        reason = f'{reason[:_MAX_REASON]}...'
      raise self._damage_error(step, f'it cannot be read ({reason})') from e

  def _verify(
    self, step: int, parts: Tree, metadata: Mapping[str, Any]
  ) -> None:
    try:
      run_metadata.verify(parts, metadata)
    except ValueError as e:
      raise self._damage_error(step, str(e)) from None

  def _damage_error(self, step: int, reason: str) -> DamagedCheckpoint:
    earlier = self._earlier_steps(step)
    if step != self.latest():
      other_steps = ', '.join(str(s) for s in self._steps() if s != step)
      advice = f'name another of its steps: {other_steps}'
    elif earlier:
      advice = (
        'add --skip_damaged to moepeft.train to go on from step '
        f'{earlier[-1]}, which evaluate and generate read by '
        f'--checkpoint={earlier[-1]}'
      )
    else:
      advice = 'there is none before it: begin anew in another --workdir'
    return DamagedCheckpoint(
      f'the checkpoint {self.path}/{step} is damaged: {reason}; {advice}'
    )
