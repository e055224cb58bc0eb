# SPDX-License-Identifier: Apache-2.0
"""From one row's logits [1, v] to a token by the row's own settings.

A step gives the most probable token of every row; these small programs follow
for rows that ask for more, so that a mask or a sort costs nothing where nobody
did, and what a row draws cannot depend on those beside it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moepeft.core.types import Array
from moepeft.inference import sampling
from moepeft.inference.sampling import Sampling


@struct.dataclass
class DrawParams:
  """How a row draws; neutral numbers for what it leaves out.

  Attributes:
    temperature: float32 scalar, 0 for the most probable.
    top_k: int32; top_p, min_p: float32.
    seed: uint32 [2], the low and the high half.
    count: int32, tokens of the answer so far.
  """

  temperature: Array
  top_k: Array
  top_p: Array
  min_p: Array
  seed: Array
  count: Array


def draw_of(s: Sampling, seed: int, count: int, v: int) -> DrawParams:
  """
  Args:
    s: numbers.
    v: of the vocabulary.
  """
  low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
  return DrawParams(
    np.float32(s.temperature or 0),
    np.int32(min(s.top_k or v, v)),
    np.float32(1 if s.top_p is None else s.top_p),
    np.float32(s.min_p or 0),
    np.array([low, high], np.uint32),
    np.int32(count),
  )


def pack(bits: np.ndarray) -> np.ndarray:
  """bool [v] of the host -> uint8 [v / 8], rounded up."""
  return np.packbits(bits, bitorder='little')


def edit(raw: Array, allowed: Array, seen: Array, penalty: Array) -> Array:
  """Logits with repetitions less likely, and -inf where nothing may come.

  Args:
    raw: the model's, [1, v].
    allowed, seen: of `pack`.
    penalty: float32 scalar, 1 for none.
  """
  allowed, seen = (_unpack(bits, raw.shape[1]) for bits in (allowed, seen))
  return jnp.where(allowed, sampling.penalise(raw, seen, penalty), -jnp.inf)


def draw(raw: Array, edited: Array, how: DrawParams) -> tuple[Array, Array]:
  """A token [1] and its log-probability [1], where there is no top-k or top-p
  and so nothing to sort.

  Args:
    edited: what is drawn from; log-probabilities are those of `raw`.
  """
  s = Sampling(how.temperature, min_p=how.min_p)
  return _drawn(raw, edited, s, how)


def draw_filtered(
  raw: Array, edited: Array, how: DrawParams
) -> tuple[Array, Array]:
  """As `draw`, with everything."""
  s = Sampling(how.temperature, how.top_k, how.top_p, how.min_p)
  return _drawn(raw, edited, s, how)


def _drawn(raw, edited, s, how):
  key = jax.random.fold_in(jax.random.key(how.seed[0]), how.seed[1])
  key = jax.random.fold_in(key, how.count)
  tokens = sampling.choose(edited, s, key[None])
  return tokens, score(raw, tokens)


def best(raw: Array, top: int) -> tuple[Array, Array]:
  """(ids, log-probabilities) of the most probable, [n, top], best first."""
  found, ids = jax.lax.top_k(raw, top)
  return ids, found - jax.nn.logsumexp(raw, axis=-1, keepdims=True)


def score(raw: Array, tokens: Array) -> Array:
  """The log-probability of a given token of each row [n, v], float32 [n]."""
  own = jnp.take_along_axis(raw, tokens[:, None], axis=-1)[:, 0]
  return own - jax.nn.logsumexp(raw, axis=-1)


@struct.dataclass
class StepOutput:
  """What a step says of its n rows.

  Attributes:
    tokens: int32 [n], the most probable.
    logprobs: float32 [n], theirs.
    finite: bool [n], whether the logits are numbers.
    logits: n of float32 [1, v].
    experts: {site: float32 [n, e]}.
  """

  tokens: Array
  logprobs: Array
  finite: Array
  logits: tuple[Array, ...]
  experts: dict[str, Array]


def step_output(logits: Array, experts: dict[str, Array]) -> StepOutput:
  """Of logits float32 [n, v]."""
  tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  rows = tuple(logits[i : i + 1] for i in range(len(logits)))
  return StepOutput(tokens, score(logits, tokens), finite, rows, experts)


def _unpack(bits: Array, v: int) -> Array:
  every = bits[:, None] >> jnp.arange(8, dtype=jnp.uint8) & 1
  return every.reshape(-1)[:v].astype(bool)[None]
