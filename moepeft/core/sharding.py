# SPDX-License-Identifier: Apache-2.0
"""One mesh, and rules as data by which arrays are spread over it.

The mesh has the axes 'data', which a batch's rows are spread over, and
'model'. A rule is a pair of the name of arrays' axes (a value of
`moepeft.core.types.AXIS_NAMES`) and the mesh axis that they are spread over.
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
  # The wide axes first. Not the layers: a scan takes one after the other, so
  # each would be fetched from one device.
  'fsdp': tuple(
    (axis, 'data')
    for axis in ('vocab', 'mlp', 'embed', 'heads', 'head_dim', 'router_input')
  ),
  # As T5X's rules: vocabulary, feed-forward and heads, also those of keys and
  # values where there are fewer.
  'tp': tuple(
    (axis, 'model') for axis in ('vocab', 'mlp', 'heads', 'kv_heads')
  ),
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """The devices, and the rules by which arrays are spread over them.

  Attributes:
    mesh: with the axes 'data' and 'model'.
    rules: (array's axis, mesh axis), tried in order.
  """

  mesh: Mesh
  rules: Rules

  @property
  def whole(self) -> NamedSharding:
    """The sharding of an array that every device holds all of."""
    return NamedSharding(self.mesh, PartitionSpec())


def layout(
  preset: str = 'dp', model: int = 1, rules: Sequence = (), devices=None
) -> Layout:
  """The layout that `config.sharding` names, for the devices at hand.

  Args:
    preset: of PRESETS.
    model: devices along the axis 'model'.
    rules: (array's axis, mesh axis) pairs that come before the preset's; the
      mesh axis None keeps an array's axis whole, whatever the rules after it
      are.

  Raises:
    ValueError: there is no such preset or axis, or `model` does
      not divide the devices.
  """
  if preset not in PRESETS:
    raise ValueError(
      f'config.sharding.preset is one of {", ".join(PRESETS)}; got {preset!r}'
    )
  unsharded, ordered_rules = set(), []
  for axis, mesh_axis in (*map(_rule, rules), *PRESETS[preset]):
    if mesh_axis is None:
      unsharded.add(axis)
    elif axis not in unsharded:
      ordered_rules.append((axis, mesh_axis))
  return Layout(make_mesh(model, devices), tuple(ordered_rules))


def _rule(pair: Any) -> tuple[str, str | None]:
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
      f'config.sharding.rules: {axis!r} is spread over one of '
      f'{", ".join(AXES)}, or None; got {mesh_axis!r}'
    )
  return axis, mesh_axis


def make_mesh(model: int = 1, devices=None) -> Mesh:
  """All devices, `model` of them along 'model', the rest along 'data'.

  Raises:
    ValueError: `model` does not divide the devices.
  """
  devices = jax.devices() if devices is None else devices
  if model < 1 or len(devices) % model:
    raise ValueError(
      f'config.sharding.model_parallel_size={model} does not divide '
      f'{len(devices)} devices; '
      'set it to a divisor'
    )
  shape = (len(devices) // model, model)
  types = (AxisType.Auto,) * 2
  return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def spec(
  layout: Layout, axes: Sequence[str], shape: tuple[int, ...]
) -> PartitionSpec:
  """The mesh axis that each axis of an array is spread over.

  The first rule that fits takes its mesh axis; it fits where the array has
  the axis and its size divides by the devices along that mesh axis.

  Args:
    axes: the names of the array's axes.
  """
  mesh_axes: list[str | None] = [None] * len(shape)
  for rule_axis, mesh_axis in layout.rules:
    devices = layout.mesh.shape[mesh_axis]
    for i, (axis, size) in enumerate(zip(axes, shape, strict=True)):
      free = mesh_axes[i] is None and mesh_axis not in mesh_axes
      if axis == rule_axis and free and devices > 1 and size % devices == 0:
        mesh_axes[i] = mesh_axis
  return trimmed(*mesh_axes)


def trimmed(*entries: str | None) -> PartitionSpec:
  """The one way to write a spec: without None at its end."""
  while entries and entries[-1] is None:
    entries = entries[:-1]
  return PartitionSpec(*entries)


def put(tree: Tree, where: Tree) -> Tree:
  """Arrays that are the same in every process, to where they shall lie."""
  if jax.process_count() == 1:
    return jax.device_put(tree, where)
  return jax.tree.map(_put, tree, where)


def _put(array, where: NamedSharding) -> jax.Array:
  if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
    data = _put(jax.random.key_data(array), where)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
  host = np.asarray(array)
  return jax.make_array_from_callback(
    host.shape, where, lambda index: host[index]
  )


def gather(tree: Tree) -> Tree:
  """Host arrays, whole, in every process; all processes must call it."""

  def gather_array(array) -> np.ndarray:
    if getattr(array, 'is_fully_addressable', True):
      return np.asarray(array)
    if array.is_fully_replicated:
      return np.asarray(array.addressable_data(0))
    return multihost_utils.process_allgather(array, tiled=True)

  return jax.tree.map(gather_array, tree)


def round_up(mesh: Mesh, rows: int) -> int:
  """The least number of rows, not below `rows`, that the devices share."""
  return -(-rows // mesh.shape['data']) * mesh.shape['data']


def share(mesh: Mesh) -> tuple[int, int]:
  """(which, of how many): the share of every batch that this process reads.

  Processes whose devices lie at the same places of 'data' read the same rows.

  Raises:
    ValueError: the processes do not share the places evenly.
  """
  places = [
    frozenset(device.process_index for device in row) for row in mesh.devices
  ]
  shares = list(dict.fromkeys(places))
  indices = [
    i for i, processes in enumerate(shares) if jax.process_index() in processes
  ]
  sizes = {places.count(processes) for processes in shares}
  if len(indices) != 1 or len(sizes) != 1:
    raise ValueError(
      f'config.sharding.model_parallel_size={mesh.shape["model"]} cuts across '
      'the '
      f'{jax.process_count()} processes; set it to a divisor or a multiple of '
      f'the {jax.local_device_count()} devices of one'
    )
  return indices[0], len(shares)


def check_rows(mesh: Mesh, rows: int) -> None:
  """Raises ValueError where a batch's rows do not divide by the devices."""
  count = mesh.shape['data']
  if rows % count:
    raise ValueError(
      f'a batch of {rows} rows does not divide by {count} devices; set '
      'config.batch_size to a multiple'
    )


def shard_whole_batch(mesh: Mesh, batch: Batch) -> Batch:
  """`shard_batch` of rows that every process holds all of."""
  check_rows(mesh, len(next(iter(batch.values()))))
  where = NamedSharding(mesh, PartitionSpec('data'))
  return put(batch, dict.fromkeys(batch, where))


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
  """The batch with its rows spread over the axis 'data'.

  Args:
    batch: host arrays; where there are several processes, this one's share
      of the rows (see `share`).

  Raises:
    ValueError: the rows do not divide by the devices.
  """
  row_count = len(next(iter(batch.values())))
  shares = 1 if jax.process_count() == 1 else share(mesh)[1]
  check_rows(mesh, row_count * shares)
  where = NamedSharding(mesh, PartitionSpec('data'))
  if jax.process_count() == 1:
    return jax.device_put(batch, where)
  return {
    key: jax.make_array_from_process_local_data(
      where, np.asarray(rows_of_process)
    )
    for key, rows_of_process in batch.items()
  }
