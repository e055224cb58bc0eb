# SPDX-License-Identifier: Apache-2.0
"""Position biases of logits (T5, ALiBi) and sinusoidal embeddings."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.types import Array
from moepeft.nn.initializers import Normal, param


def relative_bucket(
  relative: Array, buckets: int, max_distance: int, bidirectional: bool
) -> Array:
  """Maps key position - query position to a bucket in [0, buckets).

  Source: Raffel et al., arXiv:1910.10683.

  Half of the buckets of a direction are for one distance each. The others grow
  logarithmically up to `max_distance`, and the last has all larger distances.
  """
  offset = 0
  distance = -relative
  if bidirectional:
    buckets //= 2
    offset = (distance < 0) * buckets
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(distance, 0)
  exact = buckets // 2
  # At least 1, so that the log is finite where `distance < exact` too.
  scaled = jnp.maximum(distance, 1).astype(jnp.float32) / exact
  growth = jnp.log(scaled) / jnp.log(max_distance / exact) * (buckets - exact)
  large = jnp.minimum(exact + growth.astype(jnp.int32), buckets - 1)
  return offset + jnp.where(distance < exact, distance, large)


class RelativeBias(nn.Module):
  """Bias [1, n, t, s] added to the attention logits of every layer."""

  heads: int
  buckets: int
  max_distance: int
  bidirectional: bool
  stddev: float
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, queries: Array, keys: Array) -> Array:
    """queries int [t], keys int [s]: absolute positions within a row."""
    table = param(
      self,
      'embedding',
      Normal(self.stddev),
      (self.buckets, self.heads),
      'pn',
      self.param_dtype,
    )
    bucket = relative_bucket(
      keys[None, :] - queries[:, None],
      self.buckets,
      self.max_distance,
      self.bidirectional,
    )
    bias = jnp.take(table.astype(self.dtype), bucket, axis=0)
    return bias.transpose(2, 0, 1)[None]


def alibi_slopes(heads: int) -> list[float]:
  """The slope of each head; see `alibi`."""
  power = 2 ** int(math.log2(heads))
  slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
  return slopes + [
    2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)
  ]


def alibi(heads: int, queries: Array, keys: Array) -> Array:
  """Bias [b, n, t, s] that decreases linearly with distance, by head.

  Source: Press et al., arXiv:2108.12409. If the number of heads is no power of
  two, the slopes are as in its released code: those of the power below, then
  every second one of the power above.

  Args:
    queries: positions int [b, t]; keys: int [s] or [b, s].
  """
  distance = queries[:, :, None] - jnp.atleast_2d(keys)[:, None, :]
  slopes = jnp.array(alibi_slopes(heads), jnp.float32)[:, None, None]
  return -slopes * distance[:, None].astype(jnp.float32)


def sinusoidal(positions: Array, d_model: int) -> Array:
  """positions int [b, t] -> float32 [b, t, d]: sines, then cosines.

  Source: Vaswani et al., arXiv:1706.03762, section 3.5, but concatenated, as in
  tensor2tensor, not interleaved.
  """
  half = d_model // 2
  waves = jnp.exp(-math.log(10000.0) / half * jnp.arange(half))
  angles = positions[..., None].astype(jnp.float32) * waves
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
