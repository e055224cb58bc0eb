# SPDX-License-Identifier: Apache-2.0
"""The arrays of a training state that are saved in a checkpoint."""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moepeft.core.types import State, Tree


def state_parts(state: State) -> dict[str, Tree]:
  """{'trainable': tree, 'rest': optimizer state, step and rng}."""
  return {
    'trainable': state.trainable,
    'rest': {
      'opt': state.opt,
      'step': state.step,
      'rng': jax.random.key_data(state.rng),
    },
  }


def array_shapes(parts: Tree) -> dict[str, tuple]:
  """{path: (shape, dtype)}, for trees of dicts or of optimizer states."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (
      tuple(leaf.shape),
      str(leaf.dtype),
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(parts)[0]
  }


def abstract_arrays(tree: Tree) -> Tree:
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def without_alias(array: Any) -> Any:
  """Copies an array if Orbax would share its buffer.

  Orbax does not copy arrays of CPU devices before it writes them. It copies
  arrays of other devices before its `save` returns.
  """
  if not isinstance(array, jax.Array):
    return np.array(array)
  if any(device.platform == 'cpu' for device in array.devices()):
    return jax.device_put(array, array.sharding, may_alias=False)
  return array


def host_template(metadata: Any) -> np.ndarray:
  """A NumPy array of the shape and dtype that allocates no memory."""
  return np.broadcast_to(np.zeros((), metadata.dtype), metadata.shape)
