# SPDX-License-Identifier: Apache-2.0
"""Memory-efficient attention, computed in chunks of queries and keys.

The algorithm is Rabe and Staats', arXiv:2112.05682, with the online softmax of
Milakov and Gimelshein, arXiv:1805.02867. It never holds an array of all queries
x all keys.

Dimensions in the einsums: b batch, c queries of a chunk, j keys of a chunk,
k key heads, g query heads per key head, h head size.
"""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array
from moepeft.nn.attention_mask import NO_WINDOW, AttentionMask
from moepeft.nn.numerics import einsum_f32, to_f32

CHUNK = 256
# The logit of a masked key. It is finite, as in `attention.attend`, so that the
# softmax of a row without visible keys is finite too.
_MASK_VALUE = -1e9


def attend(
  heads,
  scale: float = 1.0,
  rng=None,
  dropout: float = 0.0,
  cap: float = 0.0,
  chunk: int = CHUNK,
) -> Array:
  """Computes `attention.attend`, [b, t, n, h], `chunk` tokens at a time.

  The logits of one query chunk and one key chunk are in memory at a time; the
  backward pass recomputes them. `heads.structured_mask` defines the keys that
  are visible to a query. A key chunk is skipped if all its keys are after all
  queries of the query chunk, or outside of their windows. An array mask or bias
  is read block by block. Dropout masks differ from those of `attention.attend`.

  Args:
    heads: `attention.Heads`.
    chunk: the number of queries, and of keys, per chunk.
  """
  b, t, n, h = heads.q.shape
  s, k = heads.k.shape[1:3]
  query_chunk, key_chunk = min(chunk, t), min(chunk, s)
  q = _split_chunks(heads.q.reshape(b, t, k, n // k, h), query_chunk)
  keys_values = (
    _split_chunks(heads.k, key_chunk),
    _split_chunks(heads.v, key_chunk),
  )
  structured_mask = _split_structured_mask(heads, query_chunk, key_chunk)
  mask_and_bias = _split_mask_and_bias(heads, query_chunk, key_chunk)
  query_fields = visible_chunks = None
  if structured_mask is not None:
    query_fields = (
      structured_mask.query_positions,
      structured_mask.query_segments,
    )
    visible_chunks = _visible_chunks(
      heads.structured_mask, query_chunk, key_chunk
    )

  def attend_query_chunk(xs):
    i, q, query_fields, mask_and_bias, visible_chunks = xs
    chunk_rng = None if rng is None else jax.random.fold_in(rng, i)
    chunk_mask = structured_mask
    if query_fields is not None:
      chunk_mask = structured_mask.replace(
        query_positions=query_fields[0], query_segments=query_fields[1]
      )
    return _attend_query_chunk(
      q,
      keys_values,
      chunk_mask,
      mask_and_bias,
      visible_chunks,
      scale,
      chunk_rng,
      dropout,
      cap,
    )

  xs = jnp.arange(q.shape[0]), q, query_fields, mask_and_bias, visible_chunks
  # Without the checkpoint, each query chunk would save residuals of size O(s).
  out = jax.lax.map(jax.checkpoint(attend_query_chunk), xs)
  out = jnp.moveaxis(out, 0, 1).reshape(b, -1, n, h)
  return out[:, :t].astype(heads.q.dtype)


def _split_chunks(x: Array, size: int, fill=0) -> Array:
  """[b, t, ...] -> [t / size, b, size, ...], padded at the end with `fill`."""
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, -x.shape[1] % size)
  x = jnp.pad(x, widths, constant_values=fill)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _split_structured_mask(
  heads, query_chunk: int, key_chunk: int
) -> AttentionMask | None:
  """Splits positions and segments of the structured mask into chunks, axis 0.

  Raises:
    ValueError: an adapter has added keys that the mask does not describe.
  """
  structured_mask, s = heads.structured_mask, heads.k.shape[1]
  if structured_mask is None:
    return None
  if structured_mask.key_positions.shape[1] != s:
    raise ValueError(
      'an adapter at the attention core changed the number of keys from '
      f'{structured_mask.key_positions.shape[1]} to {s}, and the structured '
      'mask does not cover the new ones; let the adapter set mask and bias'
    )
  return structured_mask.replace(
    query_positions=_split_chunks(structured_mask.query_positions, query_chunk),
    key_positions=_split_chunks(structured_mask.key_positions, key_chunk),
    query_segments=_split_chunks(structured_mask.query_segments, query_chunk),
    key_segments=_split_chunks(
      structured_mask.key_segments, key_chunk, fill=-1
    ),
  )


def _visible_chunks(
  structured_mask: AttentionMask, query_chunk: int, key_chunk: int
) -> Array:
  """Computes which key chunks each query chunk has to read.

  The result depends on positions only, not on segments. Without a KV cache,
  positions are equal in all rows of the batch, so that the result needs no
  communication between devices.

  Returns:
    bool [query chunks, key chunks].
  """

  def min_max(positions, size):
    low = jnp.min(_split_chunks(positions, size, fill=NO_WINDOW), (1, 2))
    return low, jnp.max(_split_chunks(positions, size, fill=-NO_WINDOW), (1, 2))

  min_query, max_query = min_max(structured_mask.query_positions, query_chunk)
  min_key, max_key = min_max(structured_mask.key_positions, key_chunk)
  is_future = min_key > max_query[:, None]
  is_outside_window = min_query[:, None] - max_key >= structured_mask.window
  return ~(is_future | is_outside_window)


def _split_mask_and_bias(heads, query_chunk: int, key_chunk: int):
  """Splits the array mask and the bias into blocks.

  Returns:
    (mask, bias), each [query chunks, key chunks, b, 1 or n, c, j] or None.
  """
  t, s = heads.q.shape[1], heads.k.shape[1]

  def split(x, fill):
    if x is None:
      return None
    x = jnp.broadcast_to(x, (*x.shape[:2], t, s))
    widths = ((0, 0), (0, 0), (0, -t % query_chunk), (0, -s % key_chunk))
    x = jnp.pad(x, widths, constant_values=fill)
    b, n, padded_t, padded_s = x.shape
    blocks = padded_t // query_chunk, padded_s // key_chunk
    x = x.reshape(b, n, blocks[0], query_chunk, blocks[1], key_chunk)
    return x.transpose(2, 4, 0, 1, 3, 5)

  mask = heads.mask
  if mask is None and heads.structured_mask is None:
    # The mask hides the padding that is added to the last key chunk.
    mask = jnp.ones((1, 1, t, s), bool)
  return split(mask, False), split(heads.bias, 0)


def _attend_query_chunk(
  q,
  keys_values,
  structured_mask,
  mask_and_bias,
  visible_chunks,
  scale,
  rng,
  dropout,
  cap,
):
  """Attention of one query chunk [b, c, k, g, h] over all keys, in float32."""
  mask, bias = mask_and_bias
  b, c, k, g, h = q.shape

  def step(carry, xs):
    *xs, is_visible = xs
    if is_visible is None:
      return add_key_chunk(carry, xs), None
    return jax.lax.cond(
      is_visible, add_key_chunk, lambda carry, _: carry, carry, xs
    ), None

  def add_key_chunk(carry, xs):
    max_logit, denominator, numerator = carry
    j, (key, value), mask, bias, key_positions, key_segments = xs
    logits = einsum_f32('bckgh,bjkh->bkgcj', q, key) * scale
    if cap:
      logits = cap * jnp.tanh(logits / cap)
    if structured_mask is not None:
      chunk_mask = structured_mask.replace(
        key_positions=key_positions, key_segments=key_segments
      )
      mask, bias = chunk_mask.mask(), chunk_mask.bias()
    if bias is not None:
      logits += to_f32(_group_heads(bias, k))
    if mask is not None:
      logits = jnp.where(_group_heads(mask, k), logits, _MASK_VALUE)
    # The maximum cancels in the quotient, so that it needs no gradient.
    new_max = jnp.maximum(max_logit, jax.lax.stop_gradient(jnp.max(logits, -1)))
    weights = jnp.exp(logits - new_max[..., None])
    rescale = jnp.exp(max_logit - new_max)
    denominator = denominator * rescale + jnp.sum(weights, -1)
    if rng is not None and dropout > 0:
      dropout_rng = jax.random.fold_in(rng, j)
      keep = jax.random.bernoulli(dropout_rng, 1 - dropout, weights.shape)
      weights = jnp.where(keep, weights / (1 - dropout), 0)
    weights = weights.astype(q.dtype)
    weighted_values = einsum_f32('bkgcj,bjkh->bkgch', weights, value)
    return (
      new_max,
      denominator,
      numerator * rescale[..., None] + weighted_values,
    )

  zeros = jnp.zeros((b, k, g, c), to_f32(q).dtype)
  init = (
    zeros + 2 * _MASK_VALUE,
    zeros,
    jnp.zeros((b, k, g, c, h), zeros.dtype),
  )
  key_positions = key_segments = None
  if structured_mask is not None:
    key_positions = structured_mask.key_positions
    key_segments = structured_mask.key_segments
  chunk_indices = jnp.arange(keys_values[0].shape[0])
  xs = (
    chunk_indices,
    keys_values,
    mask,
    bias,
    key_positions,
    key_segments,
    visible_chunks,
  )
  step = jax.checkpoint(step, prevent_cse=False)
  (_, denominator, numerator), _ = jax.lax.scan(step, init, xs)
  # A query whose key chunks were all skipped has the sum 0; 1 avoids 0 / 0.
  denominator = jnp.where(denominator > 0, denominator, 1)
  return jnp.moveaxis(numerator / denominator[..., None], 3, 1)


def _group_heads(x: Array, k: int) -> Array:
  """[b, 1 or n, c, j] -> [b, 1 or k, 1 or g, c, j]."""
  heads = x.shape[1]
  shape = (1, 1) if heads == 1 else (k, heads // k)
  return x.reshape(x.shape[0], *shape, *x.shape[2:])
