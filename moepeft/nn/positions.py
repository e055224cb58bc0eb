# SPDX-License-Identifier: Apache-2.0
"""T5's bucketed relative position bias (Raffel et al., arXiv:1910.10683)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moepeft.nn.parameter import param
from moepeft.nn.start import Normal
from moepeft.typing import Array


def relative_bucket(
  relative: Array, buckets: int, max_distance: int, bidirectional: bool
) -> Array:
  """Maps key position - query position to a bucket in [0, buckets).

  Half of the buckets of a direction are exact, the others grow
  logarithmically up to `max_distance`, beyond which all share the last.
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
  # The largest argument of log is positive even where `exact` is chosen.
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
