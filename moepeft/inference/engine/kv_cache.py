# SPDX-License-Identifier: Apache-2.0
"""Keys and values of all slots: rows are cut out, gone on with, and put back.

Arrays of a layer are [slots, 1, s, k, h], s the places of a row. A step cuts
out the rows that it is for, as long as the longest of them needs: what is idle
or short costs nothing. The cuts are copies, which attention reads again
anyway.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Tree

# The axis of places.
_PLACES = -3


def shapes(row: Tree, slots: int, places: int) -> Tree:
  """Of a layer's cache of so many rows.

  Args:
    row: shapes of one row's, [1, ...], of any length.
  """

  def one(a):
    shape = [slots, *a.shape[1:]]
    shape[_PLACES] = places
    return jax.ShapeDtypeStruct(tuple(shape), a.dtype)

  return jax.tree.map(one, row)


def zeros(shapes: Tree) -> Tree:
  """An empty cache."""
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def cut(cache: Tree, rows: Array, n: int, room: int) -> Tree:
  """The first places of some rows: [n, ..., room, k, h].

  Args:
    rows: int32 [n].
  """

  def one(a):
    a = jax.lax.slice_in_dim(a, 0, room, axis=a.ndim + _PLACES)
    # No gather: on CPU it goes element by element.
    cuts = [jax.lax.dynamic_slice_in_dim(a, rows[i], 1) for i in range(n)]
    return jnp.concatenate(cuts) if n > 1 else cuts[0]

  return jax.tree.map(one, cache)


def put(cache: Tree, rows: Array, new: Tree, places: Array, t: int) -> Tree:
  """Takes t places of each row over from what a step has made of the cut.

  What a row has elsewhere, and keys and values of an encoder-decoder's
  inputs, stay. Of rows that are the same the first is what stays.

  Args:
    rows: int32 [n].
    new: as from `cut`.
    places: int32 [n], the first of the t places of each row.
  """

  def one(path, a, new):
    if path[-1].key.startswith('cross'):
      return a
    axis = a.ndim + _PLACES
    for i in reversed(range(new.shape[0])):
      piece = jax.lax.dynamic_slice_in_dim(new[i : i + 1], places[i], t, axis)
      start = [jnp.int32(0)] * a.ndim
      start[0], start[axis] = rows[i], places[i]
      a = jax.lax.dynamic_update_slice(a, piece, start)
    return a

  return jax.tree_util.tree_map_with_path(one, cache, new)


def put_source(cache: Tree, row: Array, new: Tree) -> Tree:
  """Takes over a row's keys and values of its encoded inputs.

  Args:
    row: int32 scalar.
    new: one row's cache, [1, ..., room, k, h].
  """

  def one(path, a, new):
    if not path[-1].key.startswith('cross'):
      return a
    start = [jnp.int32(0)] * a.ndim
    start[0] = row
    return jax.lax.dynamic_update_slice(a, new, start)

  return jax.tree_util.tree_map_with_path(one, cache, new)


def copy(cache: Tree, source: Array, target: Array, axis: int) -> Tree:
  """A row's keys and values in another row too.

  Args:
    axis: of the slots.
  """
  cut = lambda a: jax.lax.dynamic_slice_in_dim(a, source, 1, axis)  # noqa: E731
  return _write(cache, target, cut, axis)


def clear(cache: Tree, row: Array, axis: int) -> Tree:
  """Zeros in a row: a NaN there would reach those after it, since a weight of
  zero times NaN is NaN."""
  zero = lambda a: jnp.zeros_like(jax.lax.slice_in_dim(a, 0, 1, axis=axis))  # noqa: E731
  return _write(cache, row, zero, axis)


def _write(
  cache: Tree, row: Array, of: Callable[[Array], Array], axis: int
) -> Tree:
  return jax.tree.map(
    lambda a: jax.lax.dynamic_update_slice_in_dim(a, of(a), row, axis), cache
  )
