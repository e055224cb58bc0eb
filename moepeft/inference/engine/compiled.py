# SPDX-License-Identifier: Apache-2.0
"""The programs of an engine, compiled before requests call them."""

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
from moepeft.inference.engine.weights import LayeredWeights

Key = tuple[Hashable, ...]
# (function, shapes of its arguments, indices of donated arguments).
Plan = tuple[Callable, tuple, tuple[int, ...]]


class Programs:
  """The compiled functions of an engine, by key (name and sizes).

  A call with other shapes or dtypes raises an error, so that serving never
  waits for the compiler.

  Attributes:
    weights: the weights, which are the first arguments of the programs.
    methods: {key: method} for the programs that call layers.
    cache: the shapes of all layers' caches.
  """

  def __init__(self, weights: LayeredWeights, slots: int, compile_ahead: bool):
    """
    Args:
      compile_ahead: whether calling a program that `compile` has not compiled
        is an error; otherwise the call compiles it.
    """
    self.weights = weights
    self.methods: dict[Key, LayeredMethod] = {}
    self.cache: Any = ()
    self._slots, self._compile_ahead = slots, compile_ahead
    # Functions, because tracing takes time: it waits for the compilation.
    self._plans: dict[Key, Callable[[], Plan]] = {}
    # Keys of programs that a server's requests never call.
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
    """Plans a function that calls no layers.

    Args:
      key: the name, then the sizes.
      args: arrays, or their shapes.
      donate: indices of the arguments whose memory the result may reuse.
    """
    self._plans[key] = lambda: (f, args, donate)

  def plan_cache(
    self,
    method: LayeredMethod,
    length: int,
    *inputs: Any,
    first_pass: LayeredMethod | None = None,
  ) -> None:
    """Computes the shapes of the cache, and plans `copy` and `clear` of slots.

    Args:
      method: a method of one row that creates a cache.
      length: the number of cache entries of a slot.
      inputs: the shapes of the method's inputs.
      first_pass: the method of a first pass, which has a cache of its own.

    Raises:
      ValueError: the cache does not fit into memory.
    """
    row = self._row_cache(method, inputs)
    if first_pass is not None:
      row[kv_cache.FIRST_PASS] = self._row_cache(first_pass, inputs)
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
    self.plan(('copy',), copy, self.cache, int32(), int32(), donate=(0,))
    self.plan(('clear',), clear, self.cache, int32(), donate=(0,))

  def plan_method(
    self, key: Key, method: LayeredMethod, *inputs: Any, on_demand: bool = False
  ) -> None:
    """Plans a method of n rows.

    Args:
      inputs: the shapes [n, ...] of the method's inputs.
      on_demand: whether the first call compiles it, even if `compile_ahead`.
    """
    self.methods[key] = method
    cache = self._layer_cache() if method.write_cache is not None else {}
    # Cached because two plans need it.
    layer = functools.cache(lambda: self._layer(method, cache, inputs))
    if self.weights.scan:
      plans = {key: lambda: self._scanned(method, layer()[0], inputs)}
    else:
      plans = {
        (*key, 'before'): lambda: (method.before, self._row_args(inputs), ()),
        (*key, 'layer'): lambda: (*layer(), (2,)),
        (*key, 'after'): lambda: self._after(method, *layer(), inputs),
      }
    self._plans |= plans
    if on_demand:
      self._on_demand.update(plans)

  def result(self, key: Key) -> Tree:
    """Returns the shapes of a planned method's outputs."""
    if self.weights.scan:
      f, args, _ = self._plans[key]()
      return jax.eval_shape(f, *args)[1]
    f, args, _ = self._plans[(*key, 'after')]()
    return jax.eval_shape(f, *args)

  def compile(self, progress: Callable[[str, int, int], None]) -> None:
    """Compiles all planned programs except those on demand.

    Args:
      progress: called before each program with (its name, the number of
        compiled programs, the total number).
    """
    if not self._compile_ahead:
      return
    keys = [
      key
      for key in self._plans
      if key not in self._compiled and key not in self._on_demand
    ]
    for done_count, key in enumerate(keys):
      progress(' '.join(map(str, key)), done_count, len(keys))
      self._compile(key)

  def _compile(self, key: Key) -> None:
    f, args, donate = self._plans[key]()
    jitted = jax.jit(f, donate_argnums=donate)
    self._compiled[key] = jitted.lower(*self._shapes(args)).compile()

  def _shapes(self, args: Any) -> Any:
    """Replaces arrays by their shapes on the engine's device."""
    sharding = None
    if self.weights.device is not None:
      sharding = jax.sharding.SingleDeviceSharding(self.weights.device)

    def shape(a: Any) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=sharding)

    return jax.tree.map(shape, args)

  def _row_args(self, inputs) -> tuple:
    w = self.weights
    adapters = int32(inputs[0].shape[0], w.num_buckets)
    return self._shapes((w.params, w.adapter_params, adapters, *inputs))

  def _layer_cache(self) -> Tree:
    """Returns the shapes of one layer's cache."""
    if not self.weights.scan:
      return self.cache[0]
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), self.cache
    )

  def _row_cache(self, method: LayeredMethod, inputs: tuple) -> Tree:
    """Returns the shapes of the cache that a method of one row creates."""
    method = LayeredMethod(
      method.model,
      method.name,
      method.side,
      method.arguments,
      method.outputs,
      write_cache=lambda cache, rows, positions, new: new,
    )
    layer, args = self._layer(method, {}, inputs)
    return jax.eval_shape(layer, *args)[1]

  def _layer(self, method, cache, inputs) -> tuple[Callable, tuple]:
    """Returns a layer's function and the shapes of its arguments."""
    w, n = self.weights, inputs[0].shape[0]
    args = self._row_args(inputs)
    layer = functools.partial(method.layer, block=method.block(*args))
    x, layer_args = jax.eval_shape(method.before, *args)
    params = w.first_layer(method.side), w.layer_adapters(method.side)
    rows = int32(n, w.num_buckets), int32(n), int32(n), int32()
    return layer, self._shapes((*params, cache, *rows, x, layer_args))

  def _after(self, method, layer, args, inputs) -> Plan:
    x, _, weights = jax.eval_shape(layer, *args)
    layer_weights = [weights] * self.weights.depth(method.side)
    params, adapter_params, adapters, *_ = self._row_args(inputs)
    args = params, adapter_params, adapters, x, layer_weights, *inputs
    return method.after, args, ()

  def _scanned(self, method, layer, inputs) -> Plan:
    """Returns the plan of one program with all layers."""
    w, n, side = self.weights, inputs[0].shape[0], method.side
    args = (
      *(w.params, w.layers[side], w.adapter_params, w.layer_adapters(side)),
      self.cache if method.write_cache is not None else {},
      *(int32(n, w.num_buckets), int32(n), int32(n), *inputs),
    )
    depth = w.depth(side)
    return functools.partial(_scan, method, layer, depth), args, (4,)


def _scan(
  method,
  layer,
  depth,
  params,
  layers,
  adapter_params,
  layer_adapters,
  cache,
  *args,
) -> tuple[Tree, Any]:
  """Runs a method with a scan over its layers: (the cache, the outputs)."""
  adapters, rows, positions, *inputs = args
  x, layer_args = method.before(params, adapter_params, adapters, *inputs)

  def step(x, layer_inputs):
    params, cache, index = layer_inputs
    row_args = adapters, rows, positions, index
    x, cache, weights = layer(
      params, layer_adapters, cache, *row_args, x, layer_args
    )
    return x, (cache, weights)

  indices = jnp.arange(depth, dtype=jnp.int32)
  x, (cache, weights) = jax.lax.scan(step, x, (layers, cache, indices))
  weights = [jax.tree.map(lambda a, i=i: a[i], weights) for i in range(depth)]
  return cache, method.after(
    params, adapter_params, adapters, x, weights, *inputs
  )


def int32(*shape: int) -> jax.ShapeDtypeStruct:
  """Returns an int32 array's shape for tracing."""
  return jax.ShapeDtypeStruct(shape, jnp.int32)
