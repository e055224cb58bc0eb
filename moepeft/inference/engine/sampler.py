# SPDX-License-Identifier: Apache-2.0
"""The sampler: from a step's logits to a token of each sequence, by its own
settings.

A step gives the most probable token of every row; the small programs here
follow for rows that ask for more, so that a mask or a sort costs nothing where
nobody asked, and a row's draws cannot depend on its neighbours.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moepeft.core.types import Array
from moepeft.inference import sampling
from moepeft.inference.api import Request, TokenLogprob
from moepeft.inference.engine.compiled import Programs
from moepeft.inference.engine.limits import TOP
from moepeft.inference.engine.sequence import Sequence
from moepeft.inference.sampling import Sampling

NOT_FINITE = (
  "the model's logits are no numbers: the adapter, or the base, is broken"
)


@struct.dataclass
class StepOutput:
  """Outputs of a decode step of n rows.

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
  """The outputs for logits float32 [n, v]."""
  tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  rows = tuple(logits[i : i + 1] for i in range(len(logits)))
  return StepOutput(tokens, score(logits, tokens), finite, rows, experts)


@struct.dataclass
class DrawParams:
  """A row's settings as arrays; neutral values where it has none.

  Attributes:
    temperature: float32 scalar, 0 for the most probable token.
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


def draw_params(s: Sampling, seed: int, count: int, v: int) -> DrawParams:
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


def plan(programs: Programs, v: int) -> None:
  """Plans `edit`, `draw`, `draw_filtered` and `best`, the functions of these
  names."""
  raw = jax.ShapeDtypeStruct((1, v), jnp.float32)
  bits = jax.ShapeDtypeStruct((-(-v // 8),), jnp.uint8)
  params = draw_params(Sampling(), 0, 0, v)
  programs.plan(('edit',), edit, raw, bits, bits, np.float32(1))
  programs.plan(('draw',), draw, raw, raw, params)
  programs.plan(('draw_filtered',), draw_filtered, raw, raw, params)
  programs.plan(('best',), functools.partial(best, top=min(TOP, v)), raw)


def edit(raw: Array, allowed: Array, previous: Array, penalty: Array) -> Array:
  """Logits with repetitions less likely, and -inf where a token is forbidden.

  Args:
    raw: the model's, [1, v].
    allowed, previous: bits of `pack`, of the tokens that may come and of those
      that came before.
    penalty: float32 scalar, 1 for none.
  """
  allowed, previous = (
    _unpack(bits, raw.shape[1]) for bits in (allowed, previous)
  )
  return jnp.where(allowed, sampling.penalise(raw, previous, penalty), -jnp.inf)


def draw(raw: Array, edited: Array, params: DrawParams) -> tuple[Array, Array]:
  """A token [1] and its log-probability [1], where there is no top-k or top-p
  and so nothing to sort.

  Args:
    edited: the logits of the draw; log-probabilities are those of `raw`.
  """
  s = Sampling(params.temperature, min_p=params.min_p)
  return _draw(raw, edited, s, params)


def draw_filtered(
  raw: Array, edited: Array, params: DrawParams
) -> tuple[Array, Array]:
  """As `draw`, with all filters."""
  s = Sampling(params.temperature, params.top_k, params.top_p, params.min_p)
  return _draw(raw, edited, s, params)


def _draw(raw, edited, s, params):
  key = jax.random.fold_in(jax.random.key(params.seed[0]), params.seed[1])
  key = jax.random.fold_in(key, params.count)
  tokens = sampling.choose(edited, s, key[None])
  return tokens, score(raw, tokens)


def best(raw: Array, top: int) -> tuple[Array, Array]:
  """(ids, log-probabilities) of the most probable, [n, top], best first."""
  largest, ids = jax.lax.top_k(raw, top)
  return ids, largest - jax.nn.logsumexp(raw, axis=-1, keepdims=True)


def score(raw: Array, tokens: Array) -> Array:
  """The log-probability of a given token of each row [n, v], float32 [n]."""
  logits = jnp.take_along_axis(raw, tokens[:, None], axis=-1)[:, 0]
  return logits - jax.nn.logsumexp(raw, axis=-1)


def pack(bits: np.ndarray) -> np.ndarray:
  """bool [v] of the host -> uint8 [v / 8], rounded up."""
  return np.packbits(bits, bitorder='little')


def _unpack(bits: Array, v: int) -> Array:
  unpacked = bits[:, None] >> jnp.arange(8, dtype=jnp.uint8) & 1
  return unpacked.reshape(-1)[:v].astype(bool)[None]


def sample(
  programs: Programs,
  running: list[Sequence],
  output: StepOutput,
) -> list[TokenLogprob | Exception]:
  """The next token of each sequence, or the error of that sequence alone.

  Args:
    output: of a decode step; the sequences have its first rows.
  """
  # While the device computes, the host looks for the allowed tokens.
  requests = [sequence.request for sequence in running]
  launched: list[Any] = [
    _launch(programs, sequence, logits)
    for sequence, logits in zip(running, output.logits, strict=False)
  ]
  errors = [row if isinstance(row, Exception) else None for row in launched]
  pairs = zip(launched, errors, strict=True)
  launched = [row if error is None else () for row, error in pairs]
  experts = output.experts if any(r.routing for r in requests) else {}
  launched, step = jax.device_get(
    (launched, (output.tokens, output.logprobs, output.finite, experts))
  )
  return [
    errors[i] or _token(sequence, i, launched[i], step)
    for i, sequence in enumerate(running)
  ]


def _launch(
  programs: Programs, sequence: Sequence, raw: Array
) -> tuple | Exception:
  """(a drawn token and its log-probability, or (); alternatives, or ()), or the
  error of a constraint."""
  request, v = sequence.request, raw.shape[1]
  try:
    edited = _edited(programs, sequence, raw)
  except Exception as e:
    return e
  drawn = alternatives = ()
  if edited is not raw or request.sampling.temperature:
    s = request.sampling
    params = draw_params(s, request.seed, len(sequence.answer), v)
    sorts = s.top_k is not None or s.top_p is not None
    name = 'draw_filtered' if sorts else 'draw'
    drawn = programs[(name,)](raw, edited, params)
  if request.logprobs:
    alternatives = programs[('best',)](raw)
  return drawn, alternatives


def _edited(programs: Programs, sequence: Sequence, raw: Array) -> Array:
  """The logits that the sequence chooses from."""
  request, v = sequence.request, raw.shape[1]
  early = len(sequence.answer) < request.min_new_tokens
  if request.constraint is None and sequence.previous is None and not early:
    return raw
  allowed, previous = np.ones(v, bool), np.zeros(v, bool)
  if request.constraint is not None:
    mask = request.constraint.mask()[:v]
    # The model's vocabulary may be padded.
    allowed[: len(mask)], allowed[len(mask) :] = mask, False
  if early:
    allowed[[i for i in request.eos_token_ids if 0 <= i < v]] = False
  if not allowed.any():
    raise ValueError('the constraint allows no token at all')
  if sequence.previous is not None:
    previous = sequence.previous
  penalty = np.float32(request.sampling.repetition_penalty or 1)
  return programs[('edit',)](raw, pack(allowed), pack(previous), penalty)


def _token(
  sequence: Sequence, i: int, launched: tuple, step: tuple
) -> TokenLogprob | Exception:
  """The token of row i from arrays on the host."""
  tokens, logprobs, finite, experts = step
  if not finite[i]:
    return ArithmeticError(NOT_FINITE)
  drawn, alternatives = launched
  token, logprob = drawn or (tokens[i : i + 1], logprobs[i : i + 1])
  request: Request = sequence.request
  top = ()
  if alternatives:
    top = top_logprobs(alternatives[0][0], alternatives[1][0], request.logprobs)
  return TokenLogprob(
    int(token[0]),
    None if request.logprobs is None else float(logprob[0]),
    top,
    site_experts(experts, i, sequence),
  )


def top_logprobs(
  ids: np.ndarray, logprobs: np.ndarray, count: int | None
) -> tuple[tuple[int, float], ...]:
  """(id, log-probability) of the first `count`."""
  pairs = zip(ids[: count or 0], logprobs[: count or 0], strict=True)
  return tuple((int(i), float(p)) for i, p in pairs)


def site_experts(
  weights: Mapping[str, np.ndarray], i: int, sequence: Sequence
) -> dict[str, tuple[float, ...]] | None:
  """The weights [e] at each site where the sequence's own adapter routes.

  Args:
    weights: {path: [n, e]} of all buckets, a path being a site's with the
      names of the adapter and its router in it.
    i: the sequence's row in them.

  Returns:
    None where they were not asked for, or the adapter does not route.
  """
  if not sequence.request.routing:
    return None
  experts = {}
  for path, rows in weights.items():
    keys = path.split('/')
    for at, key in enumerate(keys):
      # A whole sublayer's adapters lie beside it.
      site = '/'.join(keys[:at]).replace('/around_', '/')
      if site in sequence.adapter.sites.get(key, ()):
        experts[site] = tuple(float(w) for w in rows[i])
  return experts or None
