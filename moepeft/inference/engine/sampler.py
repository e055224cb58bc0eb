# SPDX-License-Identifier: Apache-2.0
"""The sampler: chooses each sequence's next token from a step's logits.

The decode step returns the most probable token of every row. Rows that need
more run the small programs of this module, one row at a time: other rows do not
pay for a mask or a sort, and a row's draws do not depend on the other rows.
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
from moepeft.inference.api import TokenLogprob
from moepeft.inference.engine.compiled import Programs
from moepeft.inference.engine.limits import MAX_LOGPROBS
from moepeft.inference.engine.sequence import Sequence
from moepeft.inference.sampling import Sampling
from moepeft.peft.mixture import layer_counts

NOT_FINITE = (
  "the model's logits are NaN or infinite: the adapter or the base is broken"
)


@struct.dataclass
class StepOutput:
  """Outputs of a decode step of n rows of t tokens.

  Attributes:
    tokens: int32 [n, t], the most probable token after each token.
    logprobs: float32 [n, t], the log-probabilities of `tokens`.
    finite: bool [n, t], whether all logits after the token are finite.
    logits: n x t arrays, float32 [1, v] each, row by row.
    experts: {path: float32 [n, t, l, e]}, the experts' weights.
  """

  tokens: Array
  logprobs: Array
  finite: Array
  logits: tuple[Array, ...]
  experts: dict[str, Array]


def step_output(logits: Array, experts: dict[str, Array]) -> StepOutput:
  """Computes the outputs of a step from its logits, float32 [n, t, v]."""
  n, t, v = logits.shape
  tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  flat = logits.reshape(n * t, v)
  logprobs = score(flat, tokens.reshape(-1)).reshape(n, t)
  rows = tuple(flat[i : i + 1] for i in range(n * t))
  return StepOutput(tokens, logprobs, finite, rows, experts)


@struct.dataclass
class DrawParams:
  """A row's sampling parameters as arrays; neutral values where unset.

  Attributes:
    temperature: float32 scalar; 0 is greedy.
    top_k: int32 scalar.
    top_p, min_p: float32 scalars.
    seed: uint32 [2], the low and the high half of the seed.
    count: int32 scalar, the number of tokens of the answer so far.
  """

  temperature: Array
  top_k: Array
  top_p: Array
  min_p: Array
  seed: Array
  count: Array


def draw_params(s: Sampling, seed: int, count: int, v: int) -> DrawParams:
  """Converts a request's sampling parameters to arrays.

  Args:
    s: its values are Python numbers.
    v: the size of the vocabulary.
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
  """Plans the programs that rows need for more than the best token."""
  logits = jax.ShapeDtypeStruct((1, v), jnp.float32)
  bits = jax.ShapeDtypeStruct((-(-v // 8),), jnp.uint8)
  params = draw_params(Sampling(), 0, 0, v)
  row = jax.ShapeDtypeStruct((v,), jnp.float32)
  programs.plan(('bias',), add_bias, logits, row)
  programs.plan(('edit',), edit, logits, bits, bits, np.float32(1))
  programs.plan(
    ('penalize',),
    sampling.apply_count_penalties,
    logits,
    row,
    np.float32(0),
    np.float32(0),
  )
  programs.plan(('draw',), draw, logits, logits, params)
  programs.plan(('draw_filtered',), draw_filtered, logits, logits, params)
  programs.plan(
    ('best',), functools.partial(top_tokens, top=min(MAX_LOGPROBS, v)), logits
  )


def add_bias(logits: Array, bias: Array) -> Array:
  """Adds a bias [v] to logits [1, v]."""
  return logits + bias


def edit(
  logits: Array, allowed: Array, previous: Array, penalty: Array
) -> Array:
  """Applies the repetition penalty, and sets forbidden tokens to -inf.

  Args:
    logits: the model's logits, [1, v].
    allowed, previous: masks of the allowed tokens and of the tokens in the
      sequence so far, packed by `pack`.
    penalty: float32 scalar, 1 for none.
  """
  allowed, previous = (
    _unpack(bits, logits.shape[1]) for bits in (allowed, previous)
  )
  return jnp.where(
    allowed,
    sampling.apply_repetition_penalty(logits, previous, penalty),
    -jnp.inf,
  )


def draw(
  logits: Array, edited_logits: Array, params: DrawParams
) -> tuple[Array, Array]:
  """Samples a token [1] without top-k or top-p, which would need a sort.

  Args:
    logits: the model's logits [1, v], for the log-probability.
    edited_logits: the logits [1, v] from which the token is drawn.

  Returns:
    The token [1] and its log-probability [1].
  """
  s = Sampling(params.temperature, min_p=params.min_p)
  return _draw(logits, edited_logits, s, params)


def draw_filtered(
  logits: Array, edited_logits: Array, params: DrawParams
) -> tuple[Array, Array]:
  """Samples a token with all filters; see `draw`."""
  s = Sampling(params.temperature, params.top_k, params.top_p, params.min_p)
  return _draw(logits, edited_logits, s, params)


def _draw(logits, edited_logits, s, params):
  key = jax.random.fold_in(jax.random.key(params.seed[0]), params.seed[1])
  key = jax.random.fold_in(key, params.count)
  tokens = sampling.sample_tokens(edited_logits, s, key[None])
  return tokens, score(logits, tokens)


def top_tokens(logits: Array, top: int) -> tuple[Array, Array]:
  """The `top` most probable (ids, log-probabilities), [n, top], best first."""
  largest, ids = jax.lax.top_k(logits, top)
  return ids, largest - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def score(logits: Array, tokens: Array) -> Array:
  """The log-probability of a given token of each row [n, v], float32 [n]."""
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def pack(bits: np.ndarray) -> np.ndarray:
  """Packs a mask, bool [v], to uint8 [v / 8], rounded up."""
  return np.packbits(bits, bitorder='little')


def _unpack(bits: Array, v: int) -> Array:
  unpacked = bits[:, None] >> jnp.arange(8, dtype=jnp.uint8) & 1
  return unpacked.reshape(-1)[:v].astype(bool)[None]


def sample(
  programs: Programs,
  rows: list[tuple[int, Sequence]],
  output: StepOutput,
  position: int = 0,
) -> list[TokenLogprob | Exception]:
  """Chooses the next token of each sequence.

  Args:
    rows: sequences, each with its row of the decode step.
    output: the outputs of the decode step.
    position: the index of the token, the last of the sequences so far.

  Returns:
    For each sequence its token, or the error of that sequence alone.
  """
  errors: dict[int, Exception] = {}
  samples: list[Any] = []
  # The host computes the constraints' masks while the device computes.
  t = output.tokens.shape[1]
  for i, sequence in rows:
    logits = output.logits[i * t + position]
    try:
      edited_logits = _edit_logits(programs, sequence, logits)
    except Exception as e:
      errors[i] = e
      samples.append(((), ()))
    else:
      samples.append(_sample_row(programs, sequence, logits, edited_logits))
  routing = any(sequence.request.routing for _, sequence in rows)
  experts = output.experts if routing else {}
  samples, step = jax.device_get(
    (samples, (output.tokens, output.logprobs, output.finite, experts))
  )
  step = jax.tree.map(lambda a: a[:, position], step)
  return [
    errors.get(i) or _token(sequence, i, row_samples, step)
    for (i, sequence), row_samples in zip(rows, samples, strict=True)
  ]


def _sample_row(
  programs: Programs, sequence: Sequence, logits: Array, edited_logits: Array
) -> tuple[tuple, tuple]:
  """Starts the programs that a row needs.

  Returns:
    (token, log-probability), or () if the most probable token is taken; and the
    outputs of `top_tokens`, or () if no alternatives are reported.
  """
  request, v = sequence.request, logits.shape[1]
  sampled = alternatives = ()
  if edited_logits is not logits or request.sampling.temperature:
    s = request.sampling
    params = draw_params(s, request.seed, len(sequence.answer), v)
    needs_sort = s.top_k is not None or s.top_p is not None
    name = 'draw_filtered' if needs_sort else 'draw'
    sampled = programs[(name,)](logits, edited_logits, params)
  if request.logprobs:
    alternatives = programs[('best',)](logits)
  return sampled, alternatives


def _edit_logits(
  programs: Programs, sequence: Sequence, logits: Array
) -> Array:
  """The logits from which the sequence's next token is drawn."""
  s = sequence.request.sampling
  if sequence.bias is not None:
    logits = programs[('bias',)](logits, sequence.bias)
  logits = _mask_logits(programs, sequence, logits)
  if sequence.counts is not None:
    penalties = (s.frequency_penalty or 0, s.presence_penalty or 0)
    logits = programs[('penalize',)](
      logits, sequence.counts, *map(np.float32, penalties)
    )
  return logits


def _mask_logits(
  programs: Programs, sequence: Sequence, logits: Array
) -> Array:
  """Applies the repetition penalty and the constraint."""
  request, v = sequence.request, logits.shape[1]
  forbid_eos = len(sequence.answer) < request.min_new_tokens
  if (
    request.constraint is None and sequence.previous is None and not forbid_eos
  ):
    return logits
  allowed, previous = np.ones(v, bool), np.zeros(v, bool)
  if request.constraint is not None:
    mask = request.constraint.mask()[:v]
    # The model's vocabulary may be padded.
    allowed[: len(mask)], allowed[len(mask) :] = mask, False
  if forbid_eos:
    allowed[[i for i in request.eos_token_ids if 0 <= i < v]] = False
  if not allowed.any():
    raise ValueError('the constraint allows no token of the vocabulary')
  if sequence.previous is not None:
    previous = sequence.previous
  penalty = np.float32(request.sampling.repetition_penalty or 1)
  return programs[('edit',)](logits, pack(allowed), pack(previous), penalty)


def _token(
  sequence: Sequence, i: int, sample: tuple, step: tuple
) -> TokenLogprob | Exception:
  """Makes the token of row i from arrays on the host."""
  tokens, logprobs, finite, experts = step
  if not finite[i]:
    return ArithmeticError(NOT_FINITE)
  sampled, alternatives = sample
  token, logprob = sampled or (tokens[i : i + 1], logprobs[i : i + 1])
  request = sequence.request
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
  """The first `count` pairs (id, log-probability)."""
  pairs = zip(ids[: count or 0], logprobs[: count or 0], strict=True)
  return tuple((int(i), float(p)) for i, p in pairs)


def site_experts(
  weights: Mapping[str, np.ndarray], i: int, sequence: Sequence
) -> dict[str, np.ndarray] | None:
  """The experts' weights of a sequence's adapter.

  Args:
    weights: {path: [n, l, e]} for all buckets; a path is that of the target
      module, followed by the names of the adapter and its router.
    i: the sequence's row.

  Returns:
    {target module: weights [l, e]}, NaN for experts that a layer does not have;
    None if the request does not ask for them or the adapter has no router.
  """
  if not sequence.request.routing:
    return None
  experts = {}
  for path, rows in weights.items():
    keys = path.split('/')
    for depth, key in enumerate(keys):
      # An adapter of a whole sublayer is stored beside it, in 'around_...'.
      site = '/'.join(keys[:depth]).replace('/around_', '/')
      if site in sequence.adapter.sites.get(key, ()):
        experts[site] = _without_padding(
          rows[i], sequence.adapter.experts_per_layer.get(site)
        )
  return experts or None


def _without_padding(
  weights: np.ndarray, experts_per_layer: tuple[int, ...] | str | None
) -> np.ndarray:
  """Weights [l, e], NaN for experts that a layer does not have."""
  if not experts_per_layer:
    return weights
  layers, e = weights.shape
  counts = np.array(layer_counts(experts_per_layer, layers))
  return np.where(np.arange(e) < counts[:, None], weights, np.nan)
