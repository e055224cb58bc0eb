# SPDX-License-Identifier: Apache-2.0
"""Products with low-rank matrices, which the methods of LoRA's family share."""

import math

import jax.numpy as jnp

from moepeft.core.ranges import Range
from moepeft.core.types import Array
from moepeft.nn.adapter_hook import (
  BaseLayer,
  contraction,
  flatten_features,
  kernel_letters,
  sizes,
)
from moepeft.nn.low_rank_matmul import low_rank_matmul

RANK = Range(1, 65_536)
ALPHA = Range(0, 1_000_000)
DROPOUT = Range(0, 1, below=True)


def down(x: Array, a: Array) -> Array:
  """x A: [b, t, *in] and [*in, ...] -> [b, t, ...], in x's dtype."""
  rank = a.shape[x.ndim - 2 :]
  x = flatten_features(x)
  flat = a.astype(x.dtype).reshape(x.shape[-1], -1)
  return low_rank_matmul(x, flat).reshape(*x.shape[:2], *rank)


def up(z: Array, b: Array) -> Array:
  """z B: [b, t, ...] and [..., *out] -> [b, t, *out], in z's dtype."""
  out = b.shape[z.ndim - 2 :]
  z = flatten_features(z)
  flat = b.astype(z.dtype).reshape(z.shape[-1], -1)
  return low_rank_matmul(z, flat).reshape(*z.shape[:2], *out)


def shapes(f: BaseLayer, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The input's and the output's feature shapes at a projection.

  Raises:
    ValueError: the site has no weight to stand beside.
  """
  if f.eqn is None:
    raise ValueError(
      f'{name} needs sites with a projection (like */q or */wo); '
      'change its option `targets`'
    )
  _, inner, outer, _ = contraction(f.eqn)
  size = sizes(f.eqn, f.shape)
  return tuple(size[c] for c in inner), tuple(size[c] for c in outer)


def product(a: Array, b: Array, eqn: str) -> Array:
  """A B with the axes of the kernel of `eqn`."""
  _, inner, outer, _ = contraction(eqn)
  return jnp.einsum(f'{inner}r,r{outer}->{kernel_letters(eqn)}', a, b)


def split_term(x: Array, a: Array, b: Array, weights: Array) -> Array:
  """x A B of experts whose parts are merged with weights [b, t, n, e].

  The inputs are n equal parts and so are the outputs; the weights of part n are
  those of its rows of A and of its columns of B. A last part may be smaller.

  Args:
    a, b: [*in, e, r], [e, r, *out].
  """
  splits, (e, r, *out) = weights.shape[2], b.shape
  x = _parts(flatten_features(x), 2, splits)
  a = _parts(a.astype(x.dtype).reshape(-1, e, r), 0, splits)
  z = jnp.einsum('btni,nier,btne->btr', x, a, weights, optimize='optimal')
  b = _parts(b.astype(x.dtype).reshape(e, r, -1), 2, splits)
  y = jnp.einsum('btr,btne,erno->btno', z, weights, b, optimize='optimal')
  return flatten_features(y)[..., : math.prod(out)].reshape(*x.shape[:2], *out)


def _parts(array: Array, axis: int, count: int) -> Array:
  """The array with an axis in `count` parts, the last padded with zeros."""
  size = -(-array.shape[axis] // count)
  padding = [(0, 0)] * array.ndim
  padding[axis] = (0, size * count - array.shape[axis])
  shape = (*array.shape[:axis], count, size, *array.shape[axis + 1 :])
  return jnp.pad(array, padding).reshape(shape)
