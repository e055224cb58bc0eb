# SPDX-License-Identifier: Apache-2.0
"""The KV cache: a step reads the rows of its slots and writes them back.

The arrays of a layer are [slots, 1, k, s, h], s the cache's length. A step
copies the rows of its slots, up to the length that the longest of them needs,
so idle slots and short sequences cost no time.

Routers that read the prompt have an array without a length, `prompt_mean`. A
model with a first pass of the base alone has the cache of that pass under
FIRST_PASS.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Tree

# The axis of token positions.
_LENGTH_AXIS = -2
FIRST_PASS = 'first_pass'


def _has_length(path: tuple) -> bool:
  return path[-1].key != 'prompt_mean'


def shapes(row: Tree, slots: int, length: int) -> Tree:
  """Returns the shapes of a layer's cache.

  Args:
    row: the shapes of a cache of one row, [1, ...], of any length.
  """

  def leaf_shape(path, a):
    shape = [slots, *a.shape[1:]]
    if _has_length(path):
      shape[_LENGTH_AXIS] = length
    return jax.ShapeDtypeStruct(tuple(shape), a.dtype)

  return jax.tree_util.tree_map_with_path(leaf_shape, row)


def of_pass(cache: Tree, first_pass: bool) -> Tree:
  """The part of a layer's cache that the first or the second pass has."""
  if first_pass:
    return cache[FIRST_PASS]
  return {key: tree for key, tree in cache.items() if key != FIRST_PASS}


def zeros(shapes: Tree) -> Tree:
  """An empty cache."""
  return jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), shapes
  )


def read_rows(cache: Tree, rows: Array, n: int, length: int) -> Tree:
  """Copies the first `length` entries of n rows: [n, ..., k, length, h].

  Args:
    rows: int32 [n].
  """

  def read_leaf(path, a):
    if _has_length(path):
      a = jax.lax.slice_in_dim(a, 0, length, axis=a.ndim + _LENGTH_AXIS)
    if n == 1:
      return jax.lax.dynamic_slice_in_dim(a, rows[0], 1)
    # On CPU, a gather and a concatenation of slices copy element by element,
    # and updates copy whole rows. All of the first n rows are replaced.
    copies = jax.lax.slice_in_dim(a, 0, n)
    for i in range(n):
      row = jax.lax.dynamic_slice_in_dim(a, rows[i], 1)
      copies = jax.lax.dynamic_update_slice_in_dim(copies, row, i, 0)
    return copies

  return jax.tree_util.tree_map_with_path(read_leaf, cache)


def write_rows(
  cache: Tree, rows: Array, new: Tree, positions: Array, t: int
) -> Tree:
  """Writes t entries of each row back.

  The other entries and the cross-attention's keys and values do not change. Of
  equal rows only the first is written.

  Args:
    rows: int32 [n].
    new: the rows' cache, as `read_rows` returns it.
    positions: int32 [n], the position of the first of each row's t entries.
  """

  def write_leaf(path, a, new):
    if path[-1].key.startswith('cross'):
      return a
    axis = a.ndim + _LENGTH_AXIS
    for i in reversed(range(new.shape[0])):
      entries = new[i : i + 1]
      start = [jnp.int32(0)] * a.ndim
      start[0] = rows[i]
      if _has_length(path):
        start[axis] = positions[i]
        entries = jax.lax.dynamic_slice_in_dim(entries, positions[i], t, axis)
      a = jax.lax.dynamic_update_slice(a, entries, start)
    return a

  return jax.tree_util.tree_map_with_path(write_leaf, cache, new)


def write_cross(cache: Tree, rows: Array, new: Tree) -> Tree:
  """Writes the cross-attention's keys and values of rows.

  Args:
    rows: int32 [n].
    new: the rows' cache, [n, ..., k, length, h].
  """

  def write_leaf(path, a, new):
    if not path[-1].key.startswith('cross'):
      return a
    for i in reversed(range(new.shape[0])):
      start = [jnp.int32(0)] * a.ndim
      start[0] = rows[i]
      a = jax.lax.dynamic_update_slice(a, new[i : i + 1], start)
    return a

  return jax.tree_util.tree_map_with_path(write_leaf, cache, new)


def copy(cache: Tree, source: Array, target: Array, axis: int) -> Tree:
  """Copies a row's keys and values to another row.

  Args:
    axis: the axis of slots.
  """
  row = lambda a: jax.lax.dynamic_slice_in_dim(a, source, 1, axis)  # noqa: E731
  return _write(cache, target, row, axis)


def clear(cache: Tree, row: Array, axis: int) -> Tree:
  """Writes zeros to a row.

  Otherwise a NaN would reach the slot's next sequence: attention weights of
  zero do not mask it, since 0 * NaN is NaN.
  """
  zero = lambda a: jnp.zeros_like(jax.lax.slice_in_dim(a, 0, 1, axis=axis))  # noqa: E731
  return _write(cache, row, zero, axis)


def _write(
  cache: Tree, row: Array, values: Callable[[Array], Array], axis: int
) -> Tree:
  return jax.tree.map(
    lambda a: jax.lax.dynamic_update_slice_in_dim(a, values(a), row, axis),
    cache,
  )
