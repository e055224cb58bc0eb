# SPDX-License-Identifier: Apache-2.0
"""Attention masks of decoders, as arrays or in a structured form."""

from collections.abc import Sequence

import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.nn.attention import attention_mask
from moepeft.nn.attention_mask import NO_WINDOW, AttentionMask, CausalMask


def masks(window: int, ctx: Context) -> tuple[Array, Array | None]:
  """(mask, mask with the window or None without one), bool [b, 1, t, s].

  In decoding, s is the cache, indexed by position.
  """
  if ctx.decode:
    queries, keys = ctx.positions[:, :, None], jnp.arange(ctx.cache_length)
    visible = keys <= queries
    windowed = visible & (keys > queries - window)
    return visible[:, None], windowed[:, None] if window else None
  token_mask, segments = ctx.token_mask, ctx.segment_ids
  make_mask = lambda window: attention_mask(  # noqa: E731
    token_mask, token_mask, segments, segments, causal=True, window=window
  )
  return make_mask(0), make_mask(window) if window else None


def segment_mask(slopes: Sequence[float] | None, ctx: Context) -> AttentionMask:
  """The structured form of `masks` without a window.

  Args:
    slopes: ALiBi's slope of each head, or None.
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
  no_window = jnp.int32(NO_WINDOW)
  return AttentionMask(
    query, keys, query_segments, key_segments, no_window, slopes
  )


def row_causal_mask(
  window: int, windowed: Sequence[bool], ctx: Context
) -> CausalMask | None:
  """The causal form of `masks`.

  It is None if that form does not suffice: in decoding, for packed rows, and if
  only some layers have a window.

  Args:
    windowed: whether each layer has the window; () for all.
  """
  layers_differ = window and len(set(windowed)) > 1
  if ctx.decode or ctx.segment_ids is not None or layers_differ:
    return None
  return CausalMask(ctx.token_mask, window if all(windowed) else 0)
