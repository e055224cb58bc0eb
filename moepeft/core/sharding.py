# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and the rules that shard arrays over it.

The mesh has the axes 'data', along which batches are sharded, and 'model'. A
rule is a pair of an array axis (a value of `moepeft.core.types.AXIS_NAMES`) and
the mesh axis that it is sharded along.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moepeft.core.types import AXIS_NAMES, Batch, Tree

AXES = ('data', 'model')
Rules = tuple[tuple[str, str], ...]

PRESETS: dict[str, Rules] = {
  # Every device holds all weights.
  'dp': (),
  # The wide axes first. Not the layers: the scan reads one layer at a time, so
  # one device would send each.
  'fsdp': tuple(
    (axis, 'data')
    for axis in ('vocab', 'mlp', 'embed', 'heads', 'head_dim', 'router_input')
  ),
  # T5X's rules: vocabulary, feed-forward and heads, also those of grouped keys
  # and values.
  'tp': tuple(
    (axis, 'model') for axis in ('vocab', 'mlp', 'heads', 'kv_heads')
  ),
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """The devices, and the rules that shard arrays over them.

  Attributes:
    mesh: a mesh with the axes 'data' and 'model'.
    rules: (array axis, mesh axis), tried in order.
  """

  mesh: Mesh
  rules: Rules

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of an array that every device has a full copy of."""
    return NamedSharding(self.mesh, PartitionSpec())


def layout(
  preset: str = 'dp', model: int = 1, rules: Sequence = (), devices=None
) -> Layout:
  """The layout of `config.sharding` for the available devices.

  Args:
    preset: a key of PRESETS.
    model: the number of devices along the axis 'model'.
    rules: (array axis, mesh axis) pairs that precede those of the preset. The
      mesh axis None excludes an array axis from all later rules.

  Raises:
    ValueError: there is no such preset or axis, or `model` does not divide the
      number of devices.
  """
  if preset not in PRESETS:
    raise ValueError(
      f'config.sharding.preset is one of {", ".join(PRESETS)}; got {preset!r}'
    )
  unsharded, ordered_rules = set(), []
  for axis, mesh_axis in (*map(_parse_rule, rules), *PRESETS[preset]):
    if mesh_axis is None:
      unsharded.add(axis)
    elif axis not in unsharded:
      ordered_rules.append((axis, mesh_axis))
  return Layout(make_mesh(model, devices), tuple(ordered_rules))


def _parse_rule(pair: Any) -> tuple[str, str | None]:
  if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
    raise ValueError(
      "config.sharding.rules are (array's axis, mesh axis) pairs like "
      f"('mlp', 'model'); got {pair!r}"
    )
  axis, mesh_axis = pair
  if axis in AXIS_NAMES:
    raise ValueError(
      f'config.sharding.rules: the axis {axis!r} is named '
      f'{AXIS_NAMES[axis]!r} now; write that'
    )
  if axis not in AXIS_NAMES.values():
    raise ValueError(
      f'config.sharding.rules: {axis!r} is no axis of an array; there are '
      f'{", ".join(AXIS_NAMES.values())}'
    )
  if mesh_axis not in (*AXES, None):
    raise ValueError(
      f'config.sharding.rules: {axis!r} is sharded along one of '
      f'{", ".join(AXES)}, or None; got {mesh_axis!r}'
    )
  return axis, mesh_axis


def make_mesh(model: int = 1, devices=None) -> Mesh:
  """A mesh of all devices, `model` of them along 'model'.

  Raises:
    ValueError: `model` does not divide the devices.
  """
  devices = jax.devices() if devices is None else devices
  if model < 1 or len(devices) % model:
    raise ValueError(
      f'config.sharding.model_parallel_size={model} does not divide '
      f'{len(devices)} devices; set it to a divisor'
    )
  shape = (len(devices) // model, model)
  types = (AxisType.Auto,) * 2
  return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def spec(
  layout: Layout, axes: Sequence[str], shape: tuple[int, ...]
) -> PartitionSpec:
  """The mesh axis for each axis of an array.

  The rules apply in order, and a mesh axis is used once. A rule applies to an
  axis with its name whose size is divisible by the devices along the mesh axis.

  Args:
    axes: the names of the array's axes.
  """
  mesh_axes: list[str | None] = [None] * len(shape)
  for rule_axis, mesh_axis in layout.rules:
    devices = layout.mesh.shape[mesh_axis]
    for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
      is_free = mesh_axes[i] is None and mesh_axis not in mesh_axes
      if axis == rule_axis and is_free and devices > 1 and size % devices == 0:
        mesh_axes[i] = mesh_axis
  return canonical_spec(*mesh_axes)


def canonical_spec(*entries: str | None) -> PartitionSpec:
  """A PartitionSpec without None at its end, so that equal specs are `==`."""
  while entries and entries[-1] is None:
    entries = entries[:-1]
  return PartitionSpec(*entries)


def put(tree: Tree, shardings: Tree) -> Tree:
  """`jax.device_put` of arrays that are the same in every process."""
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  return jax.tree.map(_put, tree, shardings)


def _put(array, sharding: NamedSharding) -> jax.Array:
  if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
    data = _put(jax.random.key_data(array), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
  host = np.asarray(array)
  return jax.make_array_from_callback(
    host.shape, sharding, lambda index: host[index]
  )


def gather(tree: Tree) -> Tree:
  """Full host arrays in every process; all processes must call this."""

  def gather_array(array) -> np.ndarray:
    if getattr(array, 'is_fully_addressable', True):
      return np.asarray(array)
    if array.is_fully_replicated:
      return np.asarray(array.addressable_data(0))
    return multihost_utils.process_allgather(array, tiled=True)

  return jax.tree.map(gather_array, tree)


def round_up(mesh: Mesh, rows: int) -> int:
  """Rounds up to a multiple of the devices along 'data'."""
  return -(-rows // mesh.shape['data']) * mesh.shape['data']


def process_shard(mesh: Mesh) -> tuple[int, int]:
  """(index, count) of the shard of every batch that this process reads.

  Processes with devices at the same positions along 'data' read the same rows.

  Raises:
    ValueError: the processes do not divide the axis 'data' evenly.
  """
  processes_by_row = [
    frozenset(device.process_index for device in row) for row in mesh.devices
  ]
  shards = list(dict.fromkeys(processes_by_row))
  indices = [
    i for i, processes in enumerate(shards) if jax.process_index() in processes
  ]
  sizes = {processes_by_row.count(processes) for processes in shards}
  if len(indices) != 1 or len(sizes) != 1:
    raise ValueError(
      f'config.sharding.model_parallel_size={mesh.shape["model"]} does not fit '
      f'{jax.process_count()} processes; set it to a divisor or a multiple of '
      f'the {jax.local_device_count()} devices of one process'
    )
  return indices[0], len(shards)


def check_rows(mesh: Mesh, rows: int) -> None:
  """Raises ValueError if the devices do not divide a batch's rows."""
  count = mesh.shape['data']
  if rows % count:
    raise ValueError(
      f'a batch of {rows} rows does not divide by {count} devices; set '
      'config.batch_size to a multiple'
    )


def shard_whole_batch(mesh: Mesh, batch: Batch) -> Batch:
  """Shards a batch that is the same in every process; see `shard_batch`."""
  check_rows(mesh, len(next(iter(batch.values()))))
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  return put(batch, dict.fromkeys(batch, sharding))


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
  """Shards a batch's rows along the axis 'data'.

  Args:
    batch: host arrays; with several processes, the rows of this process (see
      `process_shard`).

  Raises:
    ValueError: the devices do not divide the rows.
  """
  row_count = len(next(iter(batch.values())))
  shards = 1 if jax.process_count() == 1 else process_shard(mesh)[1]
  check_rows(mesh, row_count * shards)
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  return {
    key: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
    for key, rows in batch.items()
  }
