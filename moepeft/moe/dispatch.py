# SPDX-License-Identifier: Apache-2.0
"""Grouped products for sparse routers: tokens sorted by expert.

Where a router chooses k of e experts, each token is copied to k slots, one for
each of its experts. The slots of an expert are consecutive, and padded with
zeros to whole blocks, so that a block has one expert. A product of the slots
with the experts' kernels is then a batched product over blocks, of k experts a
token in place of e.

`jax.lax.ragged_dot` computes the same, but on CPU with all experts, and it has
no `vmap` over rows that share their experts. Experts of adapters are small
enough that a copy of the kernel for each block costs little.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from moepeft.core.types import Array

# Slots of a block: enough for a matrix product, few enough that the padding,
# half a block an expert, is small.
_LARGEST_BLOCK, _SMALLEST_BLOCK = 128, 8


@struct.dataclass
class Dispatch:
  """The slots of n tokens with k experts each.

  Attributes:
    pair: int32 [slots], token * k + i for the token's i-th expert; n * k for a
      slot of padding.
    slot: int32 [n, k], the inverse.
    expert: int32 [blocks], the expert of each block.
    weights: [slots], the combine weights; 0 for padding.
  """

  pair: Array
  slot: Array
  expert: Array
  weights: Array

  def to_slots(self, x: Array) -> Array:
    """[n, d] -> [slots, d]: each token to each of its experts."""
    return _to_slots(x, self.pair, self.slot)

  def from_slots(self, y: Array) -> Array:
    """[slots, d] -> [n, d]: the sum over each token's experts."""
    return _from_slots(y, self.pair, self.slot)

  def matmul(self, x: Array, kernels: Array) -> Array:
    """[slots, i] and [e, i, o] -> [slots, o], each slot with its expert's."""
    blocks = x.reshape(len(self.expert), -1, x.shape[-1])
    y = jnp.einsum('nsi,nio->nso', blocks, kernels[self.expert])
    return y.reshape(len(x), -1)


def dispatch(weights: Array, k: int) -> Dispatch:
  """Sorts tokens by expert.

  Args:
    weights: [n, e] combine weights, zero but for k experts of each token.
  """
  (n, e), pairs = weights.shape, weights.shape[0] * k
  block = block_size(n, e, k)
  chosen_weights, experts = jax.lax.top_k(weights, k)
  experts = experts.reshape(-1)
  sizes = jnp.bincount(experts, length=e)
  with_padding = -(-sizes // block) * block
  ends = jnp.cumsum(with_padding)
  blocks = pairs // block + e
  order = jnp.argsort(experts, stable=True)
  # The first slot of an expert, less the pairs before it in `order`.
  shift = ends - with_padding - (jnp.cumsum(sizes) - sizes)
  slots = jnp.arange(pairs) + shift[experts[order]]
  pair = jnp.full(blocks * block, pairs).at[slots].set(order)
  block_ends = jnp.arange(blocks) * block
  expert = jnp.searchsorted(ends, block_ends, side='right')
  return Dispatch(
    pair=pair,
    slot=jnp.zeros(pairs, slots.dtype).at[order].set(slots).reshape(n, k),
    expert=jnp.minimum(expert, e - 1),
    weights=_take(chosen_weights.reshape(-1), pair),
  )


def block_size(n: int, e: int, k: int) -> int:
  """A power of two near the mean number of slots of an expert."""
  mean = max(n * k // e, 1)
  return min(max(1 << mean.bit_length() - 1, _SMALLEST_BLOCK), _LARGEST_BLOCK)


def _take(x: Array, index: Array) -> Array:
  """Rows of x; zeros for indices beyond the last."""
  return jnp.take(x, index, axis=0, mode='fill', fill_value=0)


# Each is the other's transpose, and both only gather: XLA would transpose a
# gather to a scatter, which is sequential on CPU.


@jax.custom_vjp
def _to_slots(x, pair, slot):
  return _take(x, pair // slot.shape[1])


@jax.custom_vjp
def _from_slots(y, pair, slot):
  return jnp.sum(y[slot], axis=1)


def _forward(function, x, pair, slot):
  return function(x, pair, slot), (pair, slot)


def _backward(transpose, indices, gradient):
  return transpose(gradient, *indices), None, None


_to_slots.defvjp(
  functools.partial(_forward, _to_slots),
  functools.partial(_backward, _from_slots),
)
_from_slots.defvjp(
  functools.partial(_forward, _from_slots),
  functools.partial(_backward, _to_slots),
)
