# SPDX-License-Identifier: Apache-2.0
"""Programs that are compiled before the first request, and never after it."""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.core import memory
from moepeft.core.types import Tree
from moepeft.inference.engine import kv_cache, row_sampler
from moepeft.inference.engine.limits import TOP
from moepeft.inference.engine.per_layer import LayeredMethod
from moepeft.inference.engine.weights import Weights
from moepeft.inference.sampling import Sampling

Key = tuple[Hashable, ...]


class Programs:
  """Compiled functions by name and sizes.

  They are compiled ahead of their calls; one of other shapes or types is an
  error, so that none is compiled in the middle of the traffic.

  Attributes:
    weights: what they are called with; see `Weights`.
    methods: {key: (method, its layers)} of those that call layers.
    cache: shapes of all layers' caches.
  """

  def __init__(self, weights: Weights, slots: int):
    self.weights = weights
    self.methods: dict[Key, tuple[LayeredMethod, int]] = {}
    self.cache: Any = ()
    self._slots = slots
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

  def plan_with(self, key: Key, f: Callable, *args: Any) -> None:
    """`plan` of a function of (params, bank, adapters [1, z], *args), without
    layers."""
    w = self.weights
    self.plan(key, f, w.params, w.bank, ints(1, w.forms), *args)

  def plan_cache(
    self, method: LayeredMethod, places: int, *inputs: Any
  ) -> None:
    """Decides what the cache is, and plans `copy`, a slot's keys and values to
    another, and `clear`, zeros in one.

    Args:
      method: any of one row that makes it; inputs: shapes of its own.

    Raises:
      ValueError: the cache does not fit into memory.
    """
    method = LayeredMethod(
      method.model,
      method.name,
      method.side,
      method.ask,
      method.say,
      put=lambda cache, rows, places, new: new,
    )
    block, length = self._block(method, inputs)
    _, row, _ = jax.eval_shape(
      self._layer(method, block), *self._of_layer(method, {}, inputs)
    )
    layer = kv_cache.shapes(row, self._slots, places)
    leaves = jax.tree.leaves(layer)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    memory.check_arrays(
      size * length,
      f'keys and values of {self._slots:,} requests of {places:,} tokens',
      '--slots or --places',
    )
    axis = 0
    self.cache = [layer] * length
    if self.weights.together:
      axis = 1
      self.cache = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((length, *a.shape), a.dtype), layer
      )
    copy = functools.partial(kv_cache.copy, axis=axis)
    clear = functools.partial(kv_cache.clear, axis=axis)
    self.plan(('copy',), copy, self.cache, ints(), ints(), donate=(0,))
    self.plan(('clear',), clear, self.cache, ints(), donate=(0,))

  def plan_method(self, key: Key, method: LayeredMethod, *inputs: Any) -> None:
    """Plans a method of n rows.

    Args:
      inputs: shapes [n, ...] of its own.
    """
    w, n = self.weights, inputs[0].shape[0]
    block, length = self._block(method, inputs)
    self.methods[key] = method, length
    adapters, layer = ints(n, w.forms), self._layer(method, block)
    cached = method.put is not None
    own = self.cache if cached else {}
    if w.together:
      layers, bank = w.layers[method.side], w.layer_bank(method.side)
      args = w.params, layers, w.bank, bank, own, adapters, ints(n), ints(n)
      f = functools.partial(_whole, method, layer, length)
      self.plan(key, f, *args, *inputs, donate=(4,))
      return
    args = w.params, w.bank, adapters, *inputs
    self.plan((*key, 'before'), method.before, *args)
    args = self._of_layer(method, own[0] if cached else {}, inputs)
    self.plan((*key, 'layer'), layer, *args, donate=(2,))
    x, _, told = jax.eval_shape(layer, *args)
    args = w.params, w.bank, adapters, x, [told] * length, *inputs
    self.plan((*key, 'after'), method.after, *args)

  def result(self, key: Key) -> Tree:
    """Shapes of what a planned method says."""
    if self.weights.together:
      f, args, _ = self._planned[key]
      return jax.eval_shape(f, *args)[1]
    f, args, _ = self._planned[(*key, 'after')]
    return jax.eval_shape(f, *args)

  def compile(self, progress: Callable[[str, int, int], None]) -> None:
    """Makes all that is planned and not made yet."""
    todo = [key for key in self._planned if key not in self._made]
    for done, key in enumerate(todo):
      progress(' '.join(map(str, key)), done, len(todo))
      f, args, donate = self._planned[key]
      jitted = jax.jit(f, donate_argnums=donate)
      self._made[key] = jitted.lower(*args).compile()

  def _block(self, method, inputs):
    w = self.weights
    adapters = ints(inputs[0].shape[0], w.forms)
    return method.block(w.params, w.bank, adapters, *inputs)

  def _layer(self, method, block):
    return functools.partial(method.layer, block=block)

  def _of_layer(self, method, cache, inputs) -> tuple:
    """Shapes of what one layer's program takes."""
    w, n = self.weights, inputs[0].shape[0]
    adapters, bank = ints(n, w.forms), w.layer_bank(method.side)
    x, flow = jax.eval_shape(method.before, w.params, w.bank, adapters, *inputs)
    one = w.layer(method.side)
    return one, bank, cache, adapters, ints(n), ints(n), ints(), x, flow


def _whole(
  method, layer, length, params, layers, bank, own, cache, *args
) -> tuple[Tree, Any]:
  """All in one, the layers scanned: (the cache, what is said)."""
  adapters, rows, places, *inputs = args
  x, flow = method.before(params, bank, adapters, *inputs)

  def one(x, of_layer):
    params, cache, number = of_layer
    x, cache, told = layer(
      params, own, cache, adapters, rows, places, number, x, flow
    )
    return x, (cache, told)

  number = jnp.arange(length, dtype=jnp.int32)
  x, (cache, told) = jax.lax.scan(one, x, (layers, cache, number))
  told = [jax.tree.map(lambda a, i=i: a[i], told) for i in range(length)]
  return cache, method.after(params, bank, adapters, x, told, *inputs)


def _shape(a: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(np.shape(a), a.dtype)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
  """int32 of a shape."""
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def plan_picking(programs: Programs, v: int) -> None:
  """What follows a step for rows that ask for it: see `picking`."""
  raw = jax.ShapeDtypeStruct((1, v), jnp.float32)
  bits = jax.ShapeDtypeStruct((-(-v // 8),), jnp.uint8)
  how = row_sampler.draw_of(Sampling(), 0, 0, v)
  programs.plan(('edit',), row_sampler.edit, raw, bits, bits, np.float32(1))
  programs.plan(('draw',), row_sampler.draw, raw, raw, how)
  programs.plan(('draw_filtered',), row_sampler.draw_filtered, raw, raw, how)
  best = functools.partial(row_sampler.best, top=min(TOP, v))
  programs.plan(('best',), best, raw)
