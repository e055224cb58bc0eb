# SPDX-License-Identifier: Apache-2.0
"""The base weights and adapters of an engine, split by layer."""

from typing import Any

import jax
import jax.numpy as jnp

from moepeft.core.types import Tree
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.engine.per_layer import split, split_adapters

# A pool of many adapters, or the single adapter of a model.
Adapters = AdapterPool | FixedAdapter


class Weights:
  """The first arguments of an engine's programs.

  Attributes:
    scan: whether one program runs all layers.
    device: the JAX device that holds the arrays; None for the default.
    buckets: the number of adapter buckets.
    params: the parameters outside of the layers.
    layers: {side: layers}: stacked arrays if `scan`, otherwise a list.
  """

  def __init__(
    self, params: Tree, adapters: Adapters, scan: bool, device: Any = None
  ):
    self.scan, self.device, self._adapters = scan, device, adapters
    base = adapters.acquire('')
    adapters.release(base)
    self.buckets = len(base.row)
    self.params: Tree = {}
    self.layers: dict[str, Any] = {}
    self.update(params)
    self._split_cache: tuple[Tree, tuple] = (None, ())

  def update(self, params: Tree) -> None:
    """Replaces the base parameters.

    Raises:
      ValueError: a name, shape or dtype differs from the current parameters.
    """
    outer, layers = split(params)
    outer = jax.tree.map(self._to_device, outer)
    stacks = {}
    for side, stack in layers.items():
      # Each layer's arrays are separate: on CPU a slice is a copy.
      stacks[side] = (
        jax.tree.map(self._to_device, stack)
        if self.scan
        else self._unstack(stack)
      )
    if self.params and _shapes((outer, stacks)) != _shapes(
      (self.params, self.layers)
    ):
      raise ValueError(
        'the new weights have other names, shapes or dtypes than those of the '
        'engine; create another engine for them'
      )
    self.params, self.layers = outer, stacks

  @property
  def adapter_params(self) -> Tree:
    """{bucket: the adapters' arrays outside of the layers}."""
    return self._split_adapters()[0]

  def layer_adapters(self, side: str) -> Tree:
    """{bucket: the adapters' arrays in a side's layers, [slots, l, ...]}."""
    empty = {bucket: {} for bucket in self._adapters.tree}
    return self._split_adapters()[1].get(side, empty)

  def layer(self, side: str) -> Tree:
    """The first layer's parameters, for their shapes."""
    layers = self.layers[side]
    return jax.tree.map(lambda a: a[0], layers) if self.scan else layers[0]

  def depth(self, side: str) -> int:
    """The number of layers on a side."""
    layers = self.layers[side]
    return len(jax.tree.leaves(layers)[0]) if self.scan else len(layers)

  def _split_adapters(self) -> tuple:
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


def _shapes(tree: Tree) -> Tree:
  return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
