# SPDX-License-Identifier: Apache-2.0
"""The tokens that a token of a decoder sees, as masks or in a few numbers."""

from collections.abc import Sequence

import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.nn.attention import attention_mask
from moepeft.nn.attention_mask import NO_WINDOW, AttentionMask, CausalMask


def masks(window: int, ctx: Context) -> tuple[Array, Array | None]:
  """The keys that each query sees, bool [b, 1, t, s]; the same in windowed
  layers, None without a window.

  In decoding s is the cache, where a token's place is its position.
  """
  if ctx.decode:
    at, keys = ctx.positions[:, :, None], jnp.arange(ctx.cache_length)
    visible = keys <= at
    windowed = visible & (keys > at - window)
    return visible[:, None], windowed[:, None] if window else None
  real, segments = ctx.token_mask, ctx.segment_ids
  see = lambda window: attention_mask(  # noqa: E731
    real, real, segments, segments, causal=True, window=window
  )
  return see(0), see(window) if window else None


def segment_mask(slopes: Sequence[float] | None, ctx: Context) -> AttentionMask:
  """The content of `masks` without a window, in a few numbers a token.

  Args:
    slopes: of ALiBi, one a head, or None.
  """
  shape = ctx.positions.shape
  if slopes is not None:
    slopes = jnp.array(slopes, jnp.float32)
  if ctx.decode:
    keys = jnp.broadcast_to(
      jnp.arange(ctx.cache_length), (shape[0], ctx.cache_length)
    )
    query, query_segments = ctx.positions, jnp.zeros(shape, jnp.int32)
    key_segments = jnp.zeros(keys.shape, jnp.int32)
  else:
    query = keys = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    query_segments = ctx.segment_ids
    if query_segments is None:
      query_segments = jnp.zeros(shape, jnp.int32)
    key_segments = jnp.where(ctx.token_mask, query_segments, -1)
  whole = jnp.int32(NO_WINDOW)
  return AttentionMask(query, keys, query_segments, key_segments, whole, slopes)


def row_causal_mask(
  window: int, windowed: Sequence[bool], ctx: Context
) -> CausalMask | None:
  """The content of `masks` in a row's length; None where that is not enough:
  in decoding, in packed rows, and where layers differ.

  Args:
    windowed: whether each layer has the window; () for all.
  """
  mixed = window and len(set(windowed)) > 1
  if ctx.decode or ctx.segment_ids is not None or mixed:
    return None
  return CausalMask(ctx.token_mask, window if all(windowed) else 0)
