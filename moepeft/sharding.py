# SPDX-License-Identifier: Apache-2.0
"""One mesh, and where a state's and a batch's arrays lie on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moepeft.typing import Batch, Tree


def make_mesh(devices=None) -> Mesh:
  """All devices along the axis 'data'."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.array(devices), ('data',))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
  """The tree with a copy of every array on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def round_up(mesh: Mesh, rows: int) -> int:
  """The least number of rows, not below `rows`, that the devices share."""
  return -(-rows // mesh.size) * mesh.size


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
  """The batch with its rows spread over the axis 'data'.

  Raises:
    ValueError: the rows do not divide by the devices.
  """
  rows = len(next(iter(batch.values())))
  if rows % mesh.size:
    raise ValueError(
      f'a batch of {rows} rows does not divide by {mesh.size} devices; set '
      'config.batch_size to a multiple'
    )
  return jax.device_put(batch, NamedSharding(mesh, PartitionSpec('data')))
