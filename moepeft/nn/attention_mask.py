# SPDX-License-Identifier: Apache-2.0
"""Attention masks as O(t) positions and segments, without an array [t, s]."""

import jax.numpy as jnp
from flax import struct

from moepeft.core.types import Array

# More tokens than any row has: no window.
NO_WINDOW = 2**30


@struct.dataclass
class AttentionMask:
  """A causal mask with segments and a sliding window.

  Attributes:
    query_positions: int [b, t]; key_positions: int [b, s]: positions in the row
      (or in the cache).
    query_segments: int [b, t]; key_segments: int [b, s], -1 for no token.
    window: int32 scalar, the maximum number of tokens that a query attends to,
      itself included.
    slopes: float32 [n] of ALiBi (arXiv:2108.12409), or None.
  """

  query_positions: Array
  key_positions: Array
  query_segments: Array
  key_segments: Array
  window: Array
  slopes: Array | None = None

  def mask(self) -> Array:
    """bool [b, 1, t, s]."""
    distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
    same_segment = (
      self.query_segments[:, :, None] == self.key_segments[:, None, :]
    )
    return (same_segment & (distance >= 0) & (distance < self.window))[:, None]

  def bias(self) -> Array | None:
    """float32 [b, n, t, s], or None without slopes."""
    if self.slopes is None:
      return None
    distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
    slopes = self.slopes[:, None, None]
    return -slopes * distance[:, None].astype(jnp.float32)


@struct.dataclass
class CausalMask:
  """A causal mask for rows of one text and right padding.

  Attributes:
    token_mask: bool [b, t], True on tokens.
    window: the maximum number of tokens that a query attends to, itself
      included; 0 for all.
  """

  token_mask: Array
  window: int = struct.field(pytree_node=False, default=0)

  def lengths(self) -> Array:
    """The tokens in each row, int32 [b]; at least 1, as a softmax needs."""
    return jnp.maximum(jnp.sum(self.token_mask, axis=1, dtype=jnp.int32), 1)

  def mask(self) -> Array:
    """bool [b, 1, t, t]."""
    positions = jnp.arange(self.token_mask.shape[1])
    distance = positions[:, None] - positions[None, :]
    visible = (distance >= 0) & (distance < (self.window or NO_WINDOW))
    return (visible & self.token_mask[:, None, :])[:, None]

  def bias(self) -> None:
    """A causal mask has no bias."""
