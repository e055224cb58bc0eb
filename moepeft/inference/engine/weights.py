# SPDX-License-Identifier: Apache-2.0
"""A base's weights and its adapters, as the programs of layers take them."""

from typing import Any

import jax
import jax.numpy as jnp

from moepeft.core.types import Tree
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.engine.per_layer import split, split_bank

# A model's own adapter serves as a pool of one.
Adapters = AdapterPool | FixedAdapter


class Weights:
  """
  Attributes:
    scan: whether all layers are one program.
    device: the one that holds them; None for the default.
    buckets: number of buckets that adapters have.
    params: parameters of no layer.
    layers: {side: layers}, stacked where `scan`, else a list.
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
    self._split: tuple[Tree, tuple] = (None, ())

  def update(self, params: Tree) -> None:
    """Takes a base's parameters, in place of those before.

    Raises:
      ValueError: other names, shapes or types.
    """
    rest, layers = split(params)
    rest = jax.tree.map(self._array, rest)
    stacks = {}
    for side, stack in layers.items():
      # Each layer's arrays are separate: on CPU a slice is a copy.
      stacks[side] = (
        jax.tree.map(self._array, stack) if self.scan else self._unstack(stack)
      )
    if self.params and _shapes((rest, stacks)) != _shapes(
      (self.params, self.layers)
    ):
      raise ValueError(
        'the new weights have other names, shapes or types than those that '
        'the engine was made with; make an engine for them'
      )
    self.params, self.layers = rest, stacks

  @property
  def bank(self) -> Tree:
    """{bucket: the adapters' arrays of no layer}."""
    return self._split_bank()[0]

  def layer_bank(self, side: str) -> Tree:
    """{bucket: the adapters' arrays of a side's layers, [z, l, ...]}."""
    empty = {bucket: {} for bucket in self._adapters.tree}
    return self._split_bank()[1].get(side, empty)

  def layer(self, side: str) -> Tree:
    """The first layer, for its shapes."""
    layers = self.layers[side]
    return jax.tree.map(lambda a: a[0], layers) if self.scan else layers[0]

  def depth(self, side: str) -> int:
    """The number of a side's layers."""
    layers = self.layers[side]
    return len(jax.tree.leaves(layers)[0]) if self.scan else len(layers)

  def _split_bank(self) -> tuple:
    """Splits again only after a change."""
    tree = self._adapters.tree
    if tree is not self._split[0]:
      self._split = tree, split_bank(tree)
    return self._split[1]

  def _array(self, a: Any) -> jax.Array:
    if self.device is None:
      return jnp.asarray(a)
    return jax.device_put(a, self.device)

  def _unstack(self, layers: Tree) -> list[Tree]:
    count = len(jax.tree.leaves(layers)[0])
    return [
      jax.tree.map(lambda a, i=i: self._array(a[i]), layers)
      for i in range(count)
    ]


def _shapes(tree: Tree) -> Tree:
  return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
