# SPDX-License-Identifier: Apache-2.0
"""Attention without an array of queries x keys (Rabe and Staats,
arXiv:2112.05682; the sums that go along are Milakov and Gimelshein's,
arXiv:1805.02867). Letters: c queries of a part, j keys of a part, g queries
that share a key head."""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array
from moepeft.nn.attention_mask import NO_WINDOW, AttentionMask
from moepeft.nn.numerics import einsum_f32, to_f32

CHUNK = 256
# As in `attention.attend`: finite, so that rows that see nothing stay finite.
_HIDDEN = -1e9


def attend(
  heads,
  scale: float = 1.0,
  rng=None,
  dropout: float = 0.0,
  cap: float = 0.0,
  chunk: int = CHUNK,
) -> Array:
  """Computes `attention.attend`, [b, t, n, h], `chunk` tokens at a time.

  Logits live for a part of the queries and a part of the keys; the gradient
  computes them again. `heads.structured_mask` says which keys a query sees; a
  part of the keys that lies in the future of all queries of a part, or outside
  of their windows, is not computed. An array mask or bias is read part by
  part. Dropout draws other bits than the naive form does.

  Args:
    heads: `attention.Heads`.
    chunk: queries and keys of a part.
  """
  b, t, n, h = heads.q.shape
  s, k = heads.k.shape[1:3]
  rows, columns = min(chunk, t), min(chunk, s)
  q = _parts(heads.q.reshape(b, t, k, n // k, h), rows)
  keys = _parts(heads.k, columns), _parts(heads.v, columns)
  structured_mask = _split_mask(heads, rows, columns)
  squares = _squares(heads, rows, columns)
  places = (
    None
    if structured_mask is None
    else (structured_mask.query_positions, structured_mask.query_segments)
  )
  visible_parts = (
    None
    if structured_mask is None
    else _visible_parts(heads.structured_mask, rows, columns)
  )

  def of_queries(xs):
    i, q, places, squares, visible_parts = xs
    keyed = None if rng is None else jax.random.fold_in(rng, i)
    part_mask = structured_mask
    if places is not None:
      part_mask = structured_mask.replace(
        query_positions=places[0], query_segments=places[1]
      )
    return _of_queries(
      q, keys, part_mask, squares, visible_parts, scale, keyed, dropout, cap
    )

  xs = jnp.arange(q.shape[0]), q, places, squares, visible_parts
  # Its own residuals are linear in s: a part's logits are made again.
  out = jax.lax.map(jax.checkpoint(of_queries), xs)
  out = jnp.moveaxis(out, 0, 1).reshape(b, -1, n, h)
  return out[:, :t].astype(heads.q.dtype)


def _parts(x: Array, size: int, fill=0) -> Array:
  """[b, t, ...] -> [t / size, b, size, ...], filled up at the end."""
  short = -x.shape[1] % size
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, short)
  x = jnp.pad(x, widths, constant_values=fill)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _split_mask(heads, rows: int, columns: int) -> AttentionMask | None:
  """The mask with its places in parts, on axis 0."""
  structured_mask, s = heads.structured_mask, heads.k.shape[1]
  if structured_mask is None:
    return None
  if structured_mask.key_positions.shape[1] != s:
    raise ValueError(
      'an adapter at the attention core made '
      f'{structured_mask.key_positions.shape[1]} keys {s}, and the structured '
      'mask does not cover the new ones; let the adapter set mask and bias'
    )
  return structured_mask.replace(
    query_positions=_parts(structured_mask.query_positions, rows),
    key_positions=_parts(structured_mask.key_positions, columns),
    query_segments=_parts(structured_mask.query_segments, rows),
    key_segments=_parts(structured_mask.key_segments, columns, fill=-1),
  )


def _visible_parts(
  structured_mask: AttentionMask, rows: int, columns: int
) -> Array:
  """bool [parts of t, parts of s]: whether a query's place sees a key's.

  By the places alone, which are the same in all rows where no cache is: then
  no device waits for the others' rows.
  """

  def ends(places, size):
    first = jnp.min(_parts(places, size, fill=NO_WINDOW), (1, 2))
    return first, jnp.max(_parts(places, size, fill=-NO_WINDOW), (1, 2))

  (first, last), (low, high) = (
    ends(structured_mask.query_positions, rows),
    ends(structured_mask.key_positions, columns),
  )
  ahead = low > last[:, None]
  behind = first[:, None] - high >= structured_mask.window
  return ~(ahead | behind)


def _squares(heads, rows: int, columns: int):
  """Mask and bias, [parts of t, parts of s, b, 1 or n, c, j] or None."""
  t, s = heads.q.shape[1], heads.k.shape[1]

  def parts(x, fill):
    if x is None:
      return None
    x = jnp.broadcast_to(x, (*x.shape[:2], t, s))
    short = ((0, 0), (0, 0), (0, -t % rows), (0, -s % columns))
    x = jnp.pad(x, short, constant_values=fill)
    b, n, tall, long = x.shape
    x = x.reshape(b, n, tall // rows, rows, long // columns, columns)
    return x.transpose(2, 4, 0, 1, 3, 5)

  mask = heads.mask
  if mask is None and heads.structured_mask is None:
    # What is filled up at the end is never seen.
    mask = jnp.ones((1, 1, t, s), bool)
  return parts(mask, False), parts(heads.bias, 0)


def _of_queries(
  q, keys, structured_mask, squares, visible_parts, scale, rng, dropout, cap
):
  """One part of the queries [b, c, k, g, h] against all keys, float32."""
  mask, bias = squares
  b, c, k, g, h = q.shape

  def step(carry, xs):
    *xs, visible_parts = xs
    if visible_parts is None:
      return add(carry, xs), None
    return jax.lax.cond(
      visible_parts, add, lambda carry, _: carry, carry, xs
    ), None

  def add(carry, xs):
    top, total, acc = carry
    j, (key, value), mask, bias, places, segments = xs
    logits = einsum_f32('bckgh,bjkh->bkgcj', q, key) * scale
    if cap:
      logits = cap * jnp.tanh(logits / cap)
    if structured_mask is not None:
      part = structured_mask.replace(
        key_positions=places, key_segments=segments
      )
      mask, bias = part.mask(), part.bias()
    if bias is not None:
      logits += to_f32(_grouped(bias, k))
    if mask is not None:
      logits = jnp.where(_grouped(mask, k), logits, _HIDDEN)
    # It cancels: no gradient goes through the largest logit.
    new = jnp.maximum(top, jax.lax.stop_gradient(jnp.max(logits, -1)))
    weights = jnp.exp(logits - new[..., None])
    shrink = jnp.exp(top - new)
    total = total * shrink + jnp.sum(weights, -1)
    if rng is not None and dropout > 0:
      key_of = jax.random.fold_in(rng, j)
      keep = jax.random.bernoulli(key_of, 1 - dropout, weights.shape)
      weights = jnp.where(keep, weights / (1 - dropout), 0)
    weights = weights.astype(q.dtype)
    added = einsum_f32('bkgcj,bjkh->bkgch', weights, value)
    return new, total, acc * shrink[..., None] + added

  zeros = jnp.zeros((b, k, g, c), to_f32(q).dtype)
  start = (zeros + 2 * _HIDDEN, zeros, jnp.zeros((b, k, g, c, h), zeros.dtype))
  places = segments = None
  if structured_mask is not None:
    places, segments = (
      structured_mask.key_positions,
      structured_mask.key_segments,
    )
  numbers = jnp.arange(keys[0].shape[0])
  xs = (numbers, keys, mask, bias, places, segments, visible_parts)
  step = jax.checkpoint(step, prevent_cse=False)
  (_, total, acc), _ = jax.lax.scan(step, start, xs)
  # Where nothing was computed there is nothing to see: any number will do.
  total = jnp.where(total > 0, total, 1)
  return jnp.moveaxis(acc / total[..., None], 3, 1)


def _grouped(x: Array, k: int) -> Array:
  """[b, 1 or n, c, j] -> [b, 1 or k, 1 or g, c, j]."""
  heads = x.shape[1]
  shape = (1, 1) if heads == 1 else (k, heads // k)
  return x.reshape(x.shape[0], *shape, *x.shape[2:])
