# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees, said in fewer numbers than a mask has."""

import jax.numpy as jnp
from flax import struct

from moepeft.core.types import Array

# More tokens than any row has: no window.
NO_WINDOW = 2**30


@struct.dataclass
class Sight:
  """A query sees keys of its segment, not in its future, within its window.

  Attributes:
    query: int [b, t], key: int [b, s]: places in the row (or in the cache).
    query_segments: int [b, t]; key_segments: int [b, s], -1 where there is no
      token to see.
    window: int32 scalar: how many tokens a query sees at most, itself
      included.
    slopes: float32 [n] of ALiBi (arXiv:2108.12409), or None.
  """

  query: Array
  key: Array
  query_segments: Array
  key_segments: Array
  window: Array
  slopes: Array | None = None

  def mask(self) -> Array:
    """bool [b, 1, t, s]."""
    distance = self.query[:, :, None] - self.key[:, None, :]
    same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
    return (same & (distance >= 0) & (distance < self.window))[:, None]

  def bias(self) -> Array | None:
    """float32 [b, n, t, s], or None without slopes."""
    if self.slopes is None:
      return None
    distance = self.query[:, :, None] - self.key[:, None, :]
    slopes = self.slopes[:, None, None]
    return -slopes * distance[:, None].astype(jnp.float32)


@struct.dataclass
class Past:
  """A query sees its row up to itself: a row is one text and its padding.

  Attributes:
    real: bool [b, t], True on tokens, which stand before all padding.
    window: how many tokens a query sees at most, itself included; 0 for all.
  """

  real: Array
  window: int = struct.field(pytree_node=False, default=0)

  def lengths(self) -> Array:
    """Tokens of each row, int32 [b]; one where there is none, so that the
    softmax is of something."""
    return jnp.maximum(jnp.sum(self.real, axis=1, dtype=jnp.int32), 1)

  def mask(self) -> Array:
    """bool [b, 1, t, t]."""
    places = jnp.arange(self.real.shape[1])
    distance = places[:, None] - places[None, :]
    seen = (distance >= 0) & (distance < (self.window or NO_WINDOW))
    return (seen & self.real[:, None, :])[:, None]

  def bias(self) -> None:
    """There is none."""
