# SPDX-License-Identifier: Apache-2.0
"""A model with its adapters, programs and cache; for the engine's thread."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.nn.stack import written_out
from moepeft.serve import cache as cache_lib
from moepeft.serve import decoding, encoding
from moepeft.serve.banks import Banks
from moepeft.serve.picking import Said
from moepeft.serve.programs import Programs, plan_cache, plan_picking
from moepeft.serve.rows import Call
from moepeft.serve.settings import Settings
from moepeft.typing import Array, Tree


class Core:
  """What computes; its methods are named as its programs."""

  def __init__(
    self, model: Any, params: Tree, banks: Banks, settings: Settings
  ):
    model = model.clone(advice=banks.advice)
    if jax.default_backend() == 'cpu':
      # There, layers in a loop are copied out of their stack at every token.
      model = model.clone(scan=False)
      params = written_out(params) if 'layers' in _keys(params) else params
    self.model, self.settings, self.banks = model, settings, banks
    self._params = jax.tree.map(jnp.asarray, params)
    self._call = Call(model, banks.row_tree, settings.routing)
    self.programs = Programs()
    decoder_only = hasattr(model, 'extend')
    self.rooms = decoding.rooms(settings) if decoder_only else settings.rooms
    plan = decoding.plan if decoder_only else encoding.plan
    self._cache = None
    self._shapes = plan(
      self.programs,
      self._call,
      self._params,
      banks.tree,
      settings,
      _forms(banks),
    )
    plan_cache(self.programs, self._shapes)
    plan_picking(self.programs, model.config.vocab)

  def compile(self, progress: Callable[[str, int, int], None]) -> None:
    """Makes every program, and the cache.

    Args:
      progress: as of `protocol.Engine.start`.
    """
    self.programs.compile(progress)
    self.renew()

  def renew(self) -> None:
    """An empty cache: for the start, and after a step that broke off."""
    self._cache = None
    self._cache = cache_lib.zeros(self._shapes)

  @property
  def whole(self) -> bool:
    """Whether the cache is there: a step that breaks off may take it along."""
    return not any(a.is_deleted() for a in jax.tree.leaves(self._cache))

  def step(self, n: int, room: int, *args: np.ndarray) -> Said:
    return self._on(('step', n, room), *args)

  def fill(self, t: int, room: int, *args: np.ndarray) -> tuple[Array, Tree]:
    return self._on(('fill', t, room), *args)

  def attach(self, room: int, *args: np.ndarray | Array) -> None:
    return self._on(('attach', room), *args)

  def score(self, t: int, *args: np.ndarray | Array) -> tuple[Array, ...]:
    return self._of(('score', t), *args)

  def encode(self, s: int, *args: np.ndarray) -> Array:
    return self._of(('encode', s), *args)

  def copy(self, source: int, target: int) -> None:
    program = self.programs[('copy',)]
    self._cache = program(self._cache, np.int32(source), np.int32(target))

  def clear(self, slot: int) -> None:
    self._cache = self.programs[('clear',)](self._cache, np.int32(slot))

  def _of(self, key, *args):
    """A program that needs no cache."""
    return self.programs[key](self._params, self.banks.tree, *args)

  def _on(self, key, *args):
    """A program that the cache goes through."""
    program = self.programs[key]
    self._cache, result = program(
      self._params, self.banks.tree, self._cache, *args
    )
    return result


def _forms(banks: Banks) -> int:
  """How many forms adapters have."""
  base = banks.hold('')
  banks.release(base)
  return len(base.row)


def _keys(tree: Tree) -> set[str]:
  """All names in a tree of dicts."""
  if not isinstance(tree, dict):
    return set()
  return set(tree).union(*map(_keys, tree.values()))
