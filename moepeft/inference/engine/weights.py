# SPDX-License-Identifier: Apache-2.0
"""A base's weights and its banks, as the programs of layers take them."""

from typing import Any

import jax
import jax.numpy as jnp

from moepeft.core.types import Tree
from moepeft.inference.adapters.protocol import Banks
from moepeft.inference.engine.per_layer import split, split_bank


class Weights:
  """
  Attributes:
    together: whether all layers are one program.
    forms: how many forms adapters have.
    params: of no layer.
    layers: {side: layers}, stacked where `together`, else a list.
  """

  def __init__(self, params: Tree, banks: Banks, together: bool):
    self.together, self._banks = together, banks
    base = banks.hold('')
    banks.release(base)
    self.forms = len(base.row)
    params, layers = split(params)
    self.params = jax.tree.map(jnp.asarray, params)
    self.layers: dict[str, Any] = {}
    for side, own in layers.items():
      # Each layer's arrays are its own: on CPU a cut is a copy.
      self.layers[side] = (
        jax.tree.map(jnp.asarray, own) if together else _apart(own)
      )
    self._split: tuple[Tree, tuple] = (None, ())

  @property
  def bank(self) -> Tree:
    """{form: what its adapters have in no layer}."""
    return self._of_bank()[0]

  def layer_bank(self, side: str) -> Tree:
    """{form: what its adapters have in the layers of a side [z, l, ...]}."""
    found = self._of_bank()[1]
    return found.get(side, {form: {} for form in self._banks.tree})

  def layer(self, side: str) -> Tree:
    """The first layer, for its shapes."""
    layers = self.layers[side]
    return jax.tree.map(lambda a: a[0], layers) if self.together else layers[0]

  def _of_bank(self) -> tuple:
    """Split anew only after a change."""
    tree = self._banks.tree
    if tree is not self._split[0]:
      self._split = tree, split_bank(tree)
    return self._split[1]


def _apart(layers: Tree) -> list[Tree]:
  count = len(jax.tree.leaves(layers)[0])
  return [
    jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), layers) for i in range(count)
  ]
