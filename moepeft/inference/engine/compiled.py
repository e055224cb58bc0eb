# SPDX-License-Identifier: Apache-2.0
"""The programs of an engine, compiled ahead of their calls."""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.core import memory
from moepeft.core.types import Tree
from moepeft.inference.engine import kv_cache
from moepeft.inference.engine.per_layer import LayeredMethod
from moepeft.inference.engine.weights import Weights

Key = tuple[Hashable, ...]
# (function, shapes of its arguments, numbers of donated arguments).
Plan = tuple[Callable, tuple, tuple[int, ...]]


class Programs:
  """Compiled functions by name and sizes.

  A call with other shapes or types is an error, so that none is compiled in
  the middle of the traffic.

  Attributes:
    weights: their first arguments; see `Weights`.
    methods: {key: method} of the programs that call layers.
    cache: shapes of all layers' caches.
  """

  def __init__(self, weights: Weights, slots: int, compile_ahead: bool):
    """
    Args:
      compile_ahead: whether a program that `compile` has not made is an
        error; else it is made when it is needed.
    """
    self.weights = weights
    self.methods: dict[Key, LayeredMethod] = {}
    self.cache: Any = ()
    self._slots, self._compile_ahead = slots, compile_ahead
    # Tracing takes time, so it is done when a program is compiled.
    self._planned: dict[Key, Callable[[], Plan]] = {}
    # Programs that no request of a server needs.
    self._on_demand: set[Key] = set()
    self._compiled: dict[Key, Callable] = {}

  def __len__(self) -> int:
    return len(self._compiled)

  def __getitem__(self, key: Key) -> Callable:
    if key not in self._compiled:
      if self._compile_ahead and key not in self._on_demand:
        raise KeyError(f'the program {key} was not compiled ahead')
      self._compile(key)
    return self._compiled[key]

  def plan(
    self, key: Key, f: Callable, *args: Any, donate: tuple[int, ...] = ()
  ) -> None:
    """
    Args:
      key: the name, then sizes.
      args: arrays, or their shapes.
      donate: numbers of arguments whose memory the result may take.
    """
    self._planned[key] = lambda: (f, args, donate)

  def plan_cache(
    self, method: LayeredMethod, length: int, *inputs: Any
  ) -> None:
    """Decides the cache's shapes, and plans `copy`, a slot's keys and values to
    another, and `clear`, zeros in one.

    Args:
      method: any of one row that makes a cache; inputs: shapes of its own.

    Raises:
      ValueError: the cache does not fit into memory.
    """
    method = LayeredMethod(
      method.model,
      method.name,
      method.side,
      method.arguments,
      method.outputs,
      put=lambda cache, rows, positions, new: new,
    )
    layer, args = self._layer(method, {}, inputs)
    _, row, _ = jax.eval_shape(layer, *args)
    layer_cache = kv_cache.shapes(row, self._slots, length)
    depth = self.weights.depth(method.side)
    leaves = jax.tree.leaves(layer_cache)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    memory.check_arrays(
      size * depth,
      f'keys and values of {self._slots:,} requests of {length:,} tokens',
      '--slots or --places',
    )
    axis = 0
    self.cache = [layer_cache] * depth
    if self.weights.scan:
      axis = 1
      self.cache = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((depth, *a.shape), a.dtype), layer_cache
      )
    self.cache = self._shapes(self.cache)
    copy = functools.partial(kv_cache.copy, axis=axis)
    clear = functools.partial(kv_cache.clear, axis=axis)
    self.plan(('copy',), copy, self.cache, ints(), ints(), donate=(0,))
    self.plan(('clear',), clear, self.cache, ints(), donate=(0,))

  def plan_method(
    self, key: Key, method: LayeredMethod, *inputs: Any, on_demand: bool = False
  ) -> None:
    """Plans a method of n rows.

    Args:
      inputs: shapes [n, ...] of its own.
      on_demand: whether it is compiled when it is first needed, in any engine.
    """
    self.methods[key] = method
    cache = self._layer_cache() if method.put is not None else {}
    # Two of the programs need it.
    layer = functools.cache(lambda: self._layer(method, cache, inputs))
    if self.weights.scan:
      plans = {key: lambda: self._scanned(method, layer()[0], inputs)}
    else:
      plans = {
        (*key, 'before'): lambda: (method.before, self._row_args(inputs), ()),
        (*key, 'layer'): lambda: (*layer(), (2,)),
        (*key, 'after'): lambda: self._after(method, *layer(), inputs),
      }
    self._planned |= plans
    if on_demand:
      self._on_demand.update(plans)

  def result(self, key: Key) -> Tree:
    """Shapes of a planned method's outputs."""
    if self.weights.scan:
      f, args, _ = self._planned[key]()
      return jax.eval_shape(f, *args)[1]
    f, args, _ = self._planned[(*key, 'after')]()
    return jax.eval_shape(f, *args)

  def compile(self, progress: Callable[[str, int, int], None]) -> None:
    """Compiles all that is planned, but for programs on demand.

    Args:
      progress: called with (program, number done, number in all).
    """
    if not self._compile_ahead:
      return
    todo = [
      key
      for key in self._planned
      if key not in self._compiled and key not in self._on_demand
    ]
    for done_count, key in enumerate(todo):
      progress(' '.join(map(str, key)), done_count, len(todo))
      self._compile(key)

  def _compile(self, key: Key) -> None:
    f, args, donate = self._planned[key]()
    jitted = jax.jit(f, donate_argnums=donate)
    self._compiled[key] = jitted.lower(*self._shapes(args)).compile()

  def _shapes(self, args: Any) -> Any:
    """Shapes of arrays, on the engine's device."""
    sharding = None
    if self.weights.device is not None:
      sharding = jax.sharding.SingleDeviceSharding(self.weights.device)

    def shape(a: Any) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=sharding)

    return jax.tree.map(shape, args)

  def _row_args(self, inputs) -> tuple:
    w = self.weights
    adapters = ints(inputs[0].shape[0], w.buckets)
    return self._shapes((w.params, w.bank, adapters, *inputs))

  def _layer_cache(self) -> Tree:
    """Shapes of one layer's cache."""
    if not self.weights.scan:
      return self.cache[0]
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), self.cache
    )

  def _layer(self, method, cache, inputs) -> tuple[Callable, tuple]:
    """A layer's program, and shapes of its arguments."""
    w, n = self.weights, inputs[0].shape[0]
    args = self._row_args(inputs)
    layer = functools.partial(method.layer, block=method.block(*args))
    x, flow = jax.eval_shape(method.before, *args)
    bank, first = w.layer_bank(method.side), w.layer(method.side)
    rows = ints(n, w.buckets), ints(n), ints(n), ints()
    return layer, self._shapes((first, bank, cache, *rows, x, flow))

  def _after(self, method, layer, args, inputs) -> Plan:
    x, _, weights = jax.eval_shape(layer, *args)
    layer_weights = [weights] * self.weights.depth(method.side)
    params, bank, adapters, *_ = self._row_args(inputs)
    args = params, bank, adapters, x, layer_weights, *inputs
    return method.after, args, ()

  def _scanned(self, method, layer, inputs) -> Plan:
    """All layers in one program."""
    w, n = self.weights, inputs[0].shape[0]
    args = (
      *(w.params, w.layers[method.side], w.bank, w.layer_bank(method.side)),
      self.cache if method.put is not None else {},
      *(ints(n, w.buckets), ints(n), ints(n), *inputs),
    )
    depth = w.depth(method.side)
    return functools.partial(_scan, method, layer, depth), args, (4,)


def _scan(
  method, layer, depth, params, layers, bank, layer_bank, cache, *args
) -> tuple[Tree, Any]:
  """All in one, the layers scanned: (the cache, the outputs)."""
  adapters, rows, positions, *inputs = args
  x, flow = method.before(params, bank, adapters, *inputs)

  def step(x, of_layer):
    params, cache, number = of_layer
    x, cache, weights = layer(
      params, layer_bank, cache, adapters, rows, positions, number, x, flow
    )
    return x, (cache, weights)

  number = jnp.arange(depth, dtype=jnp.int32)
  x, (cache, weights) = jax.lax.scan(step, x, (layers, cache, number))
  weights = [jax.tree.map(lambda a, i=i: a[i], weights) for i in range(depth)]
  return cache, method.after(params, bank, adapters, x, weights, *inputs)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
  """int32 of a shape."""
  return jax.ShapeDtypeStruct(shape, jnp.int32)
