# SPDX-License-Identifier: Apache-2.0
"""Sampling of a token for each row of logits [b, v].

Each filter is a pure function of float32 logits that sets the logits of removed
tokens to -inf. A row's token depends on that row alone. The order is that of
`transformers`, with the penalties of counts where vLLM has them: bias,
repetition penalty, frequency and presence penalty, temperature, top-k, top-p,
min-p.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moepeft.core.types import Array


@struct.dataclass
class Sampling:
  """Sampling parameters; None leaves an operation out of the program.

  Each value is a number, or an array [b] with a number for each row.

  Attributes:
    temperature: divides the logits; None, or 0 in a row, is greedy.
    top_k: keeps this many of the most probable tokens.
    top_p: keeps the fewest most probable tokens whose probabilities sum to at
      least this value (arXiv:1904.09751).
    min_p: keeps tokens whose probability is at least this fraction of the
      highest probability (arXiv:2407.01082).
    repetition_penalty: divides the positive logits of tokens that occurred
      before, and multiplies the negative ones (arXiv:1909.05858).
    frequency_penalty: is subtracted from a token's logit for each time that the
      answer has the token, as in OpenAI's API.
    presence_penalty: is subtracted once from the logits of the answer's tokens.
    logit_bias: pairs (token id, number added to its logit) of one request.
  """

  temperature: Any = None
  top_k: Any = None
  top_p: Any = None
  min_p: Any = None
  repetition_penalty: Any = None
  frequency_penalty: Any = None
  presence_penalty: Any = None
  logit_bias: tuple[tuple[int, float], ...] = ()


# OpenAI's bounds.
MAX_COUNT_PENALTY, MAX_BIAS = 2, 100


def check(s: Sampling, vocab: int | None = None) -> None:
  """Checks the sampling parameters of a request, which are numbers.

  Args:
    vocab: the size of the vocabulary; None leaves the ids of `logit_bias` out
      of the check.

  Raises:
    ValueError: a parameter is out of range, or has no effect.
  """
  count_range = f'from -{MAX_COUNT_PENALTY} to {MAX_COUNT_PENALTY}'
  for name, holds, range_text in (
    ('temperature', lambda v: v >= 0, 'at least 0 (greedy)'),
    ('top_k', lambda v: v >= 1, 'at least 1'),
    ('top_p', lambda v: 0 < v <= 1, 'above 0 and at most 1'),
    ('min_p', lambda v: 0 <= v <= 1, 'at least 0 and at most 1'),
    ('repetition_penalty', lambda v: v > 0, 'above 0'),
    ('frequency_penalty', _is_count_penalty, count_range),
    ('presence_penalty', _is_count_penalty, count_range),
  ):
    value = getattr(s, name)
    if value is not None and not holds(value):
      raise ValueError(f'{name} is {range_text}; got {value}')
  for token, bias in s.logit_bias:
    if token < 0 or vocab is not None and token >= vocab:
      below = 'at least 0' if vocab is None else f'from 0 to {vocab - 1}'
      raise ValueError(f'a token of logit_bias is {below}; got {token}')
    if not abs(bias) <= MAX_BIAS:
      raise ValueError(
        f'logit_bias is from -{MAX_BIAS} to {MAX_BIAS}; got {bias} for the '
        f'token {token}'
      )
  if not s.temperature:
    filters = ('top_k', 'top_p', 'min_p')
    unused = [name for name in filters if getattr(s, name) is not None]
    if unused:
      raise ValueError(
        f'{", ".join(unused)} has no effect without a temperature above 0; set '
        'one, or leave it out'
      )


def apply_repetition_penalty(logits: Array, previous: Array, penalty) -> Array:
  """Makes the tokens of `previous`, bool [b, v], less likely.

  Args:
    penalty: a number or an array [b]; 1 changes nothing.
  """
  penalty = _per_row(penalty)
  penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
  return jnp.where(previous, penalized, logits)


def apply_count_penalties(
  logits: Array, counts: Array, frequency_penalty, presence_penalty
) -> Array:
  """Makes the answer's tokens less likely, as in OpenAI's API.

  Args:
    counts: [b, v], the number of times that the answer has each token.
    frequency_penalty, presence_penalty: numbers or arrays [b]; 0 changes
      nothing.
  """
  logits = logits - _per_row(frequency_penalty) * counts
  return logits - _per_row(presence_penalty) * (counts > 0)


def apply_temperature(logits: Array, temperature) -> Array:
  """Divides logits by the temperature; rows at 0 do not change."""
  temperature = _per_row(temperature)
  return logits / jnp.where(temperature > 0, temperature, 1)


def top_k(logits: Array, k) -> Array:
  """Keeps each row's k greatest logits, and ties of the smallest of them."""
  v = logits.shape[-1]
  ranks = jnp.clip(v - _per_row(k).astype(jnp.int32), 0, v - 1)
  ranks = jnp.broadcast_to(ranks, (logits.shape[0], 1))
  threshold = jnp.take_along_axis(jnp.sort(logits, axis=-1), ranks, axis=-1)
  return jnp.where(logits < threshold, -jnp.inf, logits)


def top_p(logits: Array, p) -> Array:
  """Keeps the fewest most probable tokens whose probabilities sum to >= p.

  Among equal probabilities, greater ids are kept first, as in `transformers`,
  whose sort is ascending. The most probable token is always kept.
  """
  ids = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
  ordered, ids = jax.lax.sort((logits, ids), dimension=1, num_keys=1)
  below = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
  removed = (below <= 1 - _per_row(p)).at[:, -1].set(False)
  rows = jnp.arange(logits.shape[0])[:, None]
  removed = jnp.zeros(logits.shape, bool).at[rows, ids].set(removed)
  return jnp.where(removed, -jnp.inf, logits)


def min_p(logits: Array, p) -> Array:
  """Keeps tokens at least p times as probable as the most probable one."""
  probabilities = jax.nn.softmax(logits, axis=-1)
  threshold = _per_row(p) * jnp.max(probabilities, axis=-1, keepdims=True)
  return jnp.where(probabilities < threshold, -jnp.inf, logits)


def filter_logits(logits: Array, s: Sampling) -> Array:
  """Applies the temperature, then top-k, top-p and min-p."""
  logits = apply_temperature(logits, s.temperature)
  for name, keep_top in (('top_k', top_k), ('top_p', top_p), ('min_p', min_p)):
    value = getattr(s, name)
    if value is not None:
      logits = keep_top(logits, value)
  return logits


def sample_tokens(logits: Array, s: Sampling, keys: Array | None) -> Array:
  """Samples a token for each row: int32 [b].

  Args:
    logits: [b, v], with bias and penalties applied.
    keys: a PRNG key for each row, [b]; may be None if s.temperature is None.
  """
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if s.temperature is None:
    return best
  sampled = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, s))
  is_sampled = jnp.broadcast_to(jnp.asarray(s.temperature) > 0, best.shape)
  return jnp.where(is_sampled, sampled, best).astype(jnp.int32)


def _is_count_penalty(value: float) -> bool:
  return abs(value) <= MAX_COUNT_PENALTY


def _per_row(value) -> Array:
  """Reshapes a number, or an array [b], to broadcast against [b, v]."""
  return jnp.reshape(jnp.asarray(value), (-1, 1))
