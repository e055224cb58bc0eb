# SPDX-License-Identifier: Apache-2.0
"""Optimizers for arrays padded to the largest number of experts of a layer."""

from collections.abc import Mapping

import flax
import jax
import optax

from moepeft.core.types import Tree
from moepeft.nn import expert_padding
from moepeft.nn.expert_padding import PaddedAxis


def without_padding(
  optimizer: optax.GradientTransformation, padded: Mapping[str, PaddedAxis]
) -> optax.GradientTransformation:
  """The optimizer applied to each layer's array without its padding.

  Moments, clipping and parameter scales are then those of unpadded layers, and
  the padding stays zero.

  Args:
    padded: {path of a parameter: its padded axis}.
  """

  def split(tree: Tree) -> Tree:
    arrays = expert_padding.split(_flatten(tree), padded)
    return flax.traverse_util.unflatten_dict(arrays, sep='/')

  def init(params: Tree) -> optax.OptState:
    return optimizer.init(split(params))

  def update(updates: Tree, state: optax.OptState, params: Tree):
    changes, state = optimizer.update(split(updates), state, split(params))
    changes = _flatten(changes)

    def join(path, param):
      name = _name(path)
      if name not in padded:
        return changes[name]
      axis = padded[name]
      arrays = [changes[layer] for layer in axis.paths(name)]
      return axis.join(arrays, param.shape[axis.axis])

    # Masked parameters of other groups are not leaves, and are kept.
    return jax.tree_util.tree_map_with_path(join, params), state

  return optax.GradientTransformation(init, update)


def _flatten(tree: Tree) -> dict[str, jax.Array]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {_name(path): leaf for path, leaf in flat}


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
