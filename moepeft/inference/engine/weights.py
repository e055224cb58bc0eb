# SPDX-License-Identifier: Apache-2.0
"""The base weights and adapters of an engine, split into layers."""

from typing import Any

import jax
import jax.numpy as jnp

from moepeft.core.types import Tree
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.engine.per_layer import split, split_adapters

# Many adapters in stacked arrays, or one adapter that every request has.
Adapters = AdapterPool | FixedAdapter


class LayeredWeights:
  """The parameters and adapters that an engine passes to its programs.

  A side is 'encoder' or 'decoder', a stack of layers.

  Attributes:
    scan: whether one program scans over all layers.
    device: the JAX device that holds the arrays; None for the default.
    num_buckets: the number of adapter buckets.
    params: the parameters outside of the layers.
    layers: {side: parameters of its layers}; arrays [l, ...] if `scan`,
      otherwise a list with a tree for each layer.
  """

  def __init__(
    self, params: Tree, adapters: Adapters, scan: bool, device: Any = None
  ):
    self.scan, self.device, self._adapters = scan, device, adapters
    no_adapter = adapters.acquire('')
    adapters.release(no_adapter)
    self.num_buckets = len(no_adapter.row)
    self.params: Tree = {}
    self.layers: dict[str, Any] = {}
    self.update(params)
    self._split_cache: tuple[Tree, tuple] = (None, ())

  def update(self, params: Tree) -> None:
    """Replaces the base parameters.

    Raises:
      ValueError: a name, shape or dtype differs from the current parameters.
    """
    outer_params, stacked_layers = split(params)
    outer_params = jax.tree.map(self._to_device, outer_params)
    # Unstacked now, because each slice of a stacked array is a copy on CPU.
    layers = {
      side: jax.tree.map(self._to_device, stacked)
      if self.scan
      else self._unstack(stacked)
      for side, stacked in stacked_layers.items()
    }
    if self.params and _shapes_and_dtypes(
      (outer_params, layers)
    ) != _shapes_and_dtypes((self.params, self.layers)):
      raise ValueError(
        "the new weights differ from the engine's in names, shapes or dtypes; "
        'create a new engine for them'
      )
    self.params, self.layers = outer_params, layers

  @property
  def adapter_params(self) -> Tree:
    """{bucket: adapter arrays outside of the layers, [slots, ...]}."""
    return self._cached_split()[0]

  def layer_adapters(self, side: str) -> Tree:
    """{bucket: adapter arrays of a side's layers, [slots, l, ...]}."""
    empty = {bucket: {} for bucket in self._adapters.tree}
    return self._cached_split()[1].get(side, empty)

  def first_layer(self, side: str) -> Tree:
    """The first layer's parameters, for tracing with their shapes."""
    layers = self.layers[side]
    return jax.tree.map(lambda a: a[0], layers) if self.scan else layers[0]

  def depth(self, side: str) -> int:
    """The number of layers on a side."""
    layers = self.layers[side]
    return len(jax.tree.leaves(layers)[0]) if self.scan else len(layers)

  def _cached_split(self) -> tuple:
    """Splits the adapters' tree, cached until the tree changes."""
    tree = self._adapters.tree
    if tree is not self._split_cache[0]:
      self._split_cache = tree, split_adapters(tree)
    return self._split_cache[1]

  def _to_device(self, a: Any) -> jax.Array:
    if self.device is None:
      return jnp.asarray(a)
    return jax.device_put(a, self.device)

  def _unstack(self, layers: Tree) -> list[Tree]:
    count = len(jax.tree.leaves(layers)[0])
    return [
      jax.tree.map(lambda a, i=i: self._to_device(a[i]), layers)
      for i in range(count)
    ]


def _shapes_and_dtypes(tree: Tree) -> Tree:
  return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
