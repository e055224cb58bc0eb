# SPDX-License-Identifier: Apache-2.0
"""Programs that are compiled before the first request, and never after it."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.sampling import Sampling
from moepeft.serve import cache as cache_lib
from moepeft.serve import picking
from moepeft.serve.settings import TOP
from moepeft.typing import Tree

Key = tuple[Hashable, ...]


class Programs:
  """Compiled functions by name and sizes.

  They are compiled ahead of their calls; one of other shapes or types is an
  error, so that none is compiled in the middle of the traffic.
  """

  def __init__(self):
    self._planned: dict[Key, tuple[Callable, tuple, tuple]] = {}
    self._made: dict[Key, Callable] = {}

  def __len__(self) -> int:
    return len(self._made)

  def __getitem__(self, key: Key) -> Callable:
    return self._made[key]

  def plan(
    self, key: Key, f: Callable, *args: Any, donate: tuple[int, ...] = ()
  ) -> None:
    """
    Args:
      key: the name, then sizes.
      args: arrays, or their shapes.
      donate: numbers of arguments that the result is written over.
    """
    self._planned[key] = f, jax.tree.map(_shape, args), donate

  def shapes(self, key: Key) -> Tree:
    """Of what a planned program gives."""
    f, args, _ = self._planned[key]
    return jax.eval_shape(f, *args)

  def compile(self, progress: Callable[[str, int, int], None]) -> None:
    """Makes all that is planned and not made yet."""
    todo = [key for key in self._planned if key not in self._made]
    for done, key in enumerate(todo):
      progress(' '.join(map(str, key)), done, len(todo))
      f, args, donate = self._planned[key]
      jitted = jax.jit(f, donate_argnums=donate)
      self._made[key] = jitted.lower(*args).compile()


def _shape(a: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(np.shape(a), a.dtype)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
  """int32 of a shape."""
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def plan_cache(programs: Programs, cache: Tree) -> None:
  """`copy`: a slot's keys and values to another; `clear`: zeros in one."""
  programs.plan(('copy',), cache_lib.copy, cache, ints(), ints(), donate=(0,))
  programs.plan(('clear',), cache_lib.clear, cache, ints(), donate=(0,))


def plan_picking(programs: Programs, v: int) -> None:
  """What follows a step for rows that ask for it: see `picking`."""
  raw = jax.ShapeDtypeStruct((1, v), jnp.float32)
  bits = jax.ShapeDtypeStruct((-(-v // 8),), jnp.uint8)
  how = picking.draw_of(Sampling(), 0, 0, v)
  programs.plan(('edit',), picking.edit, raw, bits, bits, np.float32(1))
  programs.plan(('draw',), picking.draw, raw, raw, how)
  programs.plan(('draw_filtered',), picking.draw_filtered, raw, raw, how)
  best = functools.partial(picking.best, top=min(TOP, v))
  programs.plan(('best',), best, raw)
