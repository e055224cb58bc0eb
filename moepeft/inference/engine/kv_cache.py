# SPDX-License-Identifier: Apache-2.0
"""Keys and values of all slots: rows are cut out, extended, and written back.

Arrays of a layer are [slots, 1, s, k, h], s the cache's length. A step cuts
out its rows, to the length that the longest of them needs: idle slots and
short texts cost nothing. The cuts are copies, which attention reads again
anyway.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Tree

# The axis of positions.
_POSITIONS = -3


def shapes(row: Tree, slots: int, length: int) -> Tree:
  """Shapes of a layer's cache.

  Args:
    row: shapes of one row's, [1, ...], of any length.
  """

  def widened(a):
    shape = [slots, *a.shape[1:]]
    shape[_POSITIONS] = length
    return jax.ShapeDtypeStruct(tuple(shape), a.dtype)

  return jax.tree.map(widened, row)


def zeros(shapes: Tree) -> Tree:
  """An empty cache."""
  return jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), shapes
  )


def cut(cache: Tree, rows: Array, n: int, length: int) -> Tree:
  """The first `length` entries of n rows: [n, ..., length, k, h].

  Args:
    rows: int32 [n].
  """

  def cut_leaf(a):
    a = jax.lax.slice_in_dim(a, 0, length, axis=a.ndim + _POSITIONS)
    # No gather: on CPU it goes element by element.
    cuts = [jax.lax.dynamic_slice_in_dim(a, rows[i], 1) for i in range(n)]
    return jnp.concatenate(cuts) if n > 1 else cuts[0]

  return jax.tree.map(cut_leaf, cache)


def put(cache: Tree, rows: Array, new: Tree, positions: Array, t: int) -> Tree:
  """Writes t entries of each row back from an extended cut.

  Other entries of a row, and an encoder-decoder's keys and values of its
  inputs, stay. Where rows repeat, the first is the one that is written.

  Args:
    rows: int32 [n].
    new: as from `cut`.
    positions: int32 [n], the first of the t entries of each row.
  """

  def put_leaf(path, a, new):
    if path[-1].key.startswith('cross'):
      return a
    axis = a.ndim + _POSITIONS
    for i in reversed(range(new.shape[0])):
      entries = jax.lax.dynamic_slice_in_dim(
        new[i : i + 1], positions[i], t, axis
      )
      start = [jnp.int32(0)] * a.ndim
      start[0], start[axis] = rows[i], positions[i]
      a = jax.lax.dynamic_update_slice(a, entries, start)
    return a

  return jax.tree_util.tree_map_with_path(put_leaf, cache, new)


def put_cross(cache: Tree, rows: Array, new: Tree) -> Tree:
  """Writes the keys and values of rows' encoded inputs.

  Args:
    rows: int32 [n].
    new: the rows' cache, [n, ..., length, k, h].
  """

  def put_leaf(path, a, new):
    if not path[-1].key.startswith('cross'):
      return a
    for i in reversed(range(new.shape[0])):
      start = [jnp.int32(0)] * a.ndim
      start[0] = rows[i]
      a = jax.lax.dynamic_update_slice(a, new[i : i + 1], start)
    return a

  return jax.tree_util.tree_map_with_path(put_leaf, cache, new)


def copy(cache: Tree, source: Array, target: Array, axis: int) -> Tree:
  """Copies a row's keys and values to another row.

  Args:
    axis: of the slots.
  """
  row = lambda a: jax.lax.dynamic_slice_in_dim(a, source, 1, axis)  # noqa: E731
  return _write(cache, target, row, axis)


def clear(cache: Tree, row: Array, axis: int) -> Tree:
  """Writes zeros to a row: a NaN there would reach the next sequence, since a
  weight of zero times NaN is NaN."""
  zero = lambda a: jnp.zeros_like(jax.lax.slice_in_dim(a, 0, 1, axis=axis))  # noqa: E731
  return _write(cache, row, zero, axis)


def _write(
  cache: Tree, row: Array, values: Callable[[Array], Array], axis: int
) -> Tree:
  return jax.tree.map(
    lambda a: jax.lax.dynamic_update_slice_in_dim(a, values(a), row, axis),
    cache,
  )
