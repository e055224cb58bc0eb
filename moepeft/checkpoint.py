# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: what training changes, and a card about the rest.

A checkpoint holds the trainable collection, the optimizer's state, the step
and the rng; the base is named by its path and content hash. Orbax does not
notice every flipped bit, so the card keeps a hash of each array and of itself.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from moepeft.interop import adapter as adapter_lib
from moepeft.models import names
from moepeft.peft import Built
from moepeft.sharding import gather
from moepeft.stopping import Course
from moepeft.typing import State, Tree
from moepeft.workdir import tell_full_disk

_BEGINNING = Course()
# The card's entries that a run must share with the checkpoint it resumes.
_SAME = ('method', 'semantics', 'trainable', 'seed', 'model')


def card(base: Any, built: Built, seed: int) -> dict[str, Any]:
  """What names a run, as JSON has it: method, semantics, base and seed."""
  described = adapter_lib.describe(
    built.method,
    built.semantics,
    base.path,
    base.sha256,
    base.config.family,
    base.config,
    base.quantise,
  )
  named = described | {'trainable': built.trainable, 'seed': seed}
  # Fields that are tuples are lists in the card that is read back.
  return json.loads(json.dumps(named))


class _Kept(PreservationPolicy):
  """The newest few, all where `newest` is None, and one that is named."""

  def __init__(self, newest: int | None):
    self._newest = newest
    self.step: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context) -> list:
    del context
    newest = {c.step for c in checkpoints[-(self._newest or 0) :]}
    return [c.step in newest or c.step == self.step for c in checkpoints]


class Checkpoints:
  """The checkpoints below a work directory, the newest few kept."""

  def __init__(self, workdir: str, keep: int | None, best: bool = False):
    """Keeps the newest `keep` (None: all), and the best one where `best`."""
    path = os.path.abspath(os.path.join(workdir, 'checkpoints'))
    self._kept, self._keep_best = _Kept(keep), best
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._kept,
      enable_async_checkpointing=False,
      create=True,
    )
    self.path = path
    self._manager = ocp.CheckpointManager(path, options=options)

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(
    self, state: State, described: dict[str, Any], course: Course = _BEGINNING
  ) -> None:
    """Writes the checkpoint of `state.step`; all of it or nothing.

    It is the same however the state is spread; all processes must call it.

    Raises:
      ValueError: the disk is full; the checkpoints before are whole.
    """
    if self._keep_best:
      self._kept.step = course.best_step
    trainable, rest = gather((state.trainable, _rest(state)))
    hashes = _hashes({'trainable': trainable, 'rest': rest})
    found = described | {
      'hashes': hashes,
      'step': int(state.step),
      'course': dataclasses.asdict(course),
    }
    args = ocp.args.Composite(
      trainable=ocp.args.StandardSave(trainable),
      rest=ocp.args.StandardSave(rest),
      card=ocp.args.JsonSave(found | {'sha256': _seal(found)}),
    )
    with tell_full_disk(self.path, self.latest):
      self._write(int(state.step), args)

  def _write(self, step: int, args: ocp.args.Composite) -> None:
    with _quiet():
      try:
        self._manager.save(step, args=args)
        self._manager.wait_until_finished()
      except Exception:
        self._give_up(step)
        raise

  def _give_up(self, step: int) -> None:
    """Removes half a checkpoint: it counts as none, its space is wanted."""
    half = f'{glob.escape(self.path)}/{step}.orbax-*-tmp*'
    # Of Orbax's threads one has failed, and others still write for a while.
    gone = 0
    for _ in range(50):
      found = glob.glob(half)
      gone = 0 if found else gone + 1
      if gone == 3:
        break
      for path in found:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.1)

  def restore(self, state: State, described: dict[str, Any]) -> State:
    """The latest checkpoint in the place of a fresh state, spread as that is.

    Raises:
      ValueError: it belongs to another run, or is damaged.
    """
    step = self.latest()
    found = self._card(step)
    for key in _SAME:
      if found.get(key) != described[key]:
        raise ValueError(
          f'{self.path} belongs to another run: its {key} is '
          f'{found.get(key)!r}, this run has {described[key]!r}; choose '
          'another --workdir, or set the config back'
        )
    if found['base']['sha256'] != described['base']['sha256']:
      raise ValueError(
        f'{self.path} belongs to a run on another base than '
        f'{described["base"]["path"]!r} (their content hashes differ); set '
        'config.model.path to its own, or choose another --workdir'
      )
    before, now = (
      card['base'].get('quantise', '') for card in (found, described)
    )
    if before != now:
      raise ValueError(
        f'{self.path} belongs to a run with config.model.quantise={before!r}, '
        f'this run has {now!r}; set it back, or choose another --workdir'
      )
    restored = self._restore(
      step,
      trainable=ocp.args.StandardRestore(_abstract(state.trainable)),
      rest=ocp.args.StandardRestore(_abstract(_rest(state))),
    )
    rest = restored['rest']
    parts = {'trainable': restored['trainable'], 'rest': rest}
    self._verify(step, gather(parts), found['hashes'])
    return state.replace(
      trainable=restored['trainable'],
      opt=rest['opt'],
      step=rest['step'],
      rng=jax.random.wrap_key_data(rest['rng']),
    )

  def course(self) -> Course:
    """How the run had gone at the latest checkpoint."""
    found = self._card(self.latest())['course']
    place = tuple(map(tuple, found.pop('place')))
    return Course(place=place, **found)

  def restore_trainable(self, which: str = '') -> tuple[Tree, dict[str, Any]]:
    """The trainable collection of a checkpoint, and its card.

    Args:
      which: '' for the latest, 'best' for that of the least validation loss,
        or the number of its step.

    Raises:
      ValueError: there is no such checkpoint, or it is damaged.
    """
    step = self._find(which)
    found = self._card(step)
    tree = self._restore(step, trainable=ocp.args.StandardRestore())
    self._verify(step, {'trainable': tree['trainable']}, found['hashes'])
    return jax.tree.map(np.asarray, tree['trainable']), found

  def _find(self, which: str) -> int:
    step, steps = self.latest(), sorted(self._manager.all_steps())
    if step is None:
      raise ValueError(f'{self.path} holds no checkpoint; train first')
    if which == 'best':
      step = self.course().best_step
    elif which:
      step = int(which) if which.isdigit() else -1
    if step not in steps:
      raise ValueError(
        f'{self.path} holds no checkpoint {which!r}; it has those of the steps '
        f'{", ".join(map(str, steps))} (best: train with '
        'config.checkpoint.best=True)'
      )
    return step

  def _card(self, step: int) -> dict[str, Any]:
    card = self._restore(step, card=ocp.args.JsonRestore())['card']
    sealed = {k: v for k, v in card.items() if k != 'sha256'}
    if card.get('sha256') != _seal(sealed):
      raise ValueError(
        f'the checkpoint {self.path}/{step} is damaged: its card differs from '
        f'its hash; {self._advice(step)}'
      )
    return card

  def _restore(self, step: int, **items) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, OSError, KeyError) as e:
      reason = (str(e).splitlines() or [type(e).__name__])[0]
      raise ValueError(
        f'the checkpoint {self.path}/{step} cannot be read ({reason}); if the '
        f'config is still that of the run, it is damaged: {self._advice(step)}'
      ) from e

  def _verify(self, step: int, parts: Tree, hashes: dict[str, str]) -> None:
    for name, found in _hashes(parts).items():
      if found != hashes.get(name):
        raise ValueError(
          f'the checkpoint {self.path}/{step} is damaged: {name} differs from '
          f'its hash; {self._advice(step)}'
        )

  def _advice(self, step: int) -> str:
    before = [s for s in self._manager.all_steps() if s < step]
    then = f'go on from step {max(before)}' if before else 'begin anew'
    return f'move that directory away to {then}'


def _seal(card: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Orbax's threads log the traceback of what the caller is raised anyway."""
  logger = logging.getLogger('absl')
  before = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(before)


def _hashes(parts: Tree) -> dict[str, str]:
  """{path: hash} of every array; optimizer states are no plain dicts."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): names.array_hash(
      np.asarray(leaf)
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(parts)[0]
  }


def restore_trained(
  workdir: str, which: str = ''
) -> tuple[Tree, dict[str, Any]]:
  """(what a run trained, its card): 'peft', or 'params' of a full run.

  Args:
    which: see `Checkpoints.restore_trainable`.

  Raises:
    ValueError: no run is there, or its checkpoint is damaged.
  """
  if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
    raise ValueError(f'{workdir!r} is no work directory of a run')
  return Checkpoints(workdir, keep=None).restore_trainable(which)


def restore_adapter(
  workdir: str, which: str = ''
) -> tuple[Tree, dict[str, Any]]:
  """(the trained 'peft' tree, its card) of a run.

  Raises:
    ValueError: as `restore_trained`, or the run trained the base itself.
  """
  tree, found = restore_trained(workdir, which)
  if found['trainable'] != 'peft':
    raise ValueError(
      f'the run in {workdir!r} trained the base itself ({found["method"]}); '
      'it has no adapter'
    )
  return tree, found


def _rest(state: State) -> Tree:
  return {
    'opt': state.opt,
    'step': state.step,
    'rng': jax.random.key_data(state.rng),
  }


def _abstract(tree: Tree) -> Tree:
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
