# SPDX-License-Identifier: Apache-2.0
"""From logits [b, v] to a token a row: penalties, filters, and the draw.

Each filter is a pure function on float32 logits that sets what it takes out
to -inf. A row's outcome depends on that row alone. The order is that of
`transformers`: repetition penalty, temperature, top-k, top-p, min-p.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moepeft.core.types import Array


@struct.dataclass
class Sampling:
  """Settings of the choice of a token; None leaves a part out of the program.

  Each is one number, or one for each row [b].

  Attributes:
    temperature: logits are divided by it; None, or 0 in a row, is greedy.
    top_k: so many of the most probable are kept.
    top_p: the fewest whose probabilities sum to it (arXiv:1904.09751).
    min_p: those at least so probable as this share of the most probable
      (arXiv:2407.01082).
    repetition_penalty: logits of tokens that were there before are divided by
      it where positive and multiplied where negative (arXiv:1909.05858).
  """

  temperature: Any = None
  top_k: Any = None
  top_p: Any = None
  min_p: Any = None
  repetition_penalty: Any = None


def check(s: Sampling) -> None:
  """Looks at numbers that a user gave.

  Raises:
    ValueError: one cannot be, or does nothing; the message names it.
  """
  for name, holds, range_text in (
    ('temperature', lambda v: v >= 0, 'at least 0 (greedy)'),
    ('top_k', lambda v: v >= 1, 'at least 1'),
    ('top_p', lambda v: 0 < v <= 1, 'above 0 and at most 1'),
    ('min_p', lambda v: 0 <= v <= 1, 'at least 0 and at most 1'),
    ('repetition_penalty', lambda v: v > 0, 'above 0'),
  ):
    value = getattr(s, name)
    if value is not None and not holds(value):
      raise ValueError(f'{name} is {range_text}; got {value}')
  if not s.temperature:
    filters = ('top_k', 'top_p', 'min_p')
    idle = [name for name in filters if getattr(s, name) is not None]
    if idle:
      raise ValueError(
        f'{", ".join(idle)} does nothing without a temperature above 0; set '
        'one, or leave it out'
      )


def penalise(logits: Array, previous: Array, penalty) -> Array:
  """Logits with tokens that were there before made less likely.

  Args:
    previous: bool [b, v].
  """
  penalty = _column(penalty)
  less = jnp.where(logits < 0, logits * penalty, logits / penalty)
  return jnp.where(previous, less, logits)


def warm(logits: Array, temperature) -> Array:
  """Logits over the temperature; rows at 0 stay as they are."""
  temperature = _column(temperature)
  return logits / jnp.where(temperature > 0, temperature, 1)


def top_k(logits: Array, k) -> Array:
  """Keeps each row's k greatest, and what equals the least of them."""
  v = logits.shape[-1]
  places = jnp.clip(v - _column(k).astype(jnp.int32), 0, v - 1)
  places = jnp.broadcast_to(places, (logits.shape[0], 1))
  least = jnp.take_along_axis(jnp.sort(logits, axis=-1), places, axis=-1)
  return jnp.where(logits < least, -jnp.inf, logits)


def top_p(logits: Array, p) -> Array:
  """Keeps the fewest of the most probable whose sum is at least p.

  Of equal ones those of greater ids are kept first, as in `transformers`,
  whose sort is ascending; the most probable is always kept.
  """
  ids = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
  ordered, ids = jax.lax.sort((logits, ids), dimension=1, num_keys=1)
  below = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
  out = (below <= 1 - _column(p)).at[:, -1].set(False)
  rows = jnp.arange(logits.shape[0])[:, None]
  out = jnp.zeros(logits.shape, bool).at[rows, ids].set(out)
  return jnp.where(out, -jnp.inf, logits)


def min_p(logits: Array, p) -> Array:
  """Keeps what is at least p times as probable as the most probable."""
  probabilities = jax.nn.softmax(logits, axis=-1)
  least = _column(p) * jnp.max(probabilities, axis=-1, keepdims=True)
  return jnp.where(probabilities < least, -jnp.inf, logits)


def filtered(logits: Array, s: Sampling) -> Array:
  """The logits of the draw: temperature, then top-k, top-p and min-p."""
  logits = warm(logits, s.temperature)
  for name, keep in (('top_k', top_k), ('top_p', top_p), ('min_p', min_p)):
    value = getattr(s, name)
    if value is not None:
      logits = keep(logits, value)
  return logits


def choose(logits: Array, s: Sampling, keys: Array | None) -> Array:
  """A token for each row: int32 [b].

  Args:
    logits: penalised already, [b, v].
    keys: of each row's draw, [b]; may be None where all is greedy.
  """
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if s.temperature is None:
    return best
  drawn = jax.vmap(jax.random.categorical)(keys, filtered(logits, s))
  warm_rows = jnp.broadcast_to(jnp.asarray(s.temperature) > 0, best.shape)
  return jnp.where(warm_rows, drawn, best).astype(jnp.int32)


def _column(value) -> Array:
  """One number, or one for each row, that broadcasts against [b, v]."""
  return jnp.reshape(jnp.asarray(value), (-1, 1))
