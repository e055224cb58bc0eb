# SPDX-License-Identifier: Apache-2.0
"""Checksums of device arrays, independent of their sharding.

A checksum is a wrapping uint32 sum over elements, in two lanes. The summand is
a bijective mix of an element's bits and its index in the global array. Integer
sums do not depend on their order, so each device sums its shard, nothing is
gathered, and every mesh gives the same checksum. A change of one element always
changes both lanes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.core.types import Array, Tree

# An odd constant for each lane.
_LANES = (0x9E3779B9, 0x85EBCA6B)


def checksums(tree: Tree) -> dict[str, str]:
  """{path: 'float32[3,5] 0123456789abcdef'} of every array of a tree.

  All processes of a run must call it.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): _text(leaf)
    for path, leaf in flat
  }


def _text(array: Array | np.ndarray) -> str:
  shape = ','.join(map(str, array.shape))
  # Fetched before the next sum starts: programs with collectives that XLA loads
  # from a compilation cache overlap on the devices of a CPU, and wait for each
  # other forever.
  digits = ''.join(f'{int(lane):08x}' for lane in _lane_sums(array))
  return f'{array.dtype}[{shape}] {digits}'


@jax.jit
def _lane_sums(array: Array) -> tuple[Array, ...]:
  """A uint32 [] for each lane."""
  bits = _bits(array)
  # The index in the global array; it wraps beyond 2^32 elements.
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    stride = math.prod(bits.shape[axis + 1 :]) % 2**32
    positions = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index += positions * jnp.uint32(stride)
  return tuple(
    jnp.sum(_mix(bits ^ _mix(index + jnp.uint32(lane))), dtype=jnp.uint32)
    for lane in _LANES
  )


def _bits(array: Array) -> Array:
  """Elements as uint32; 64-bit elements become two, on a new last axis."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  size = array.dtype.itemsize
  if size >= 4:
    return jax.lax.bitcast_convert_type(array, jnp.uint32)
  unsigned = {1: jnp.uint8, 2: jnp.uint16}[size]
  return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(x: Array) -> Array:
  """MurmurHash3's finalizer, a bijection of 32 bits."""
  x ^= x >> 16
  x *= jnp.uint32(0x85EBCA6B)
  x ^= x >> 13
  x *= jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
