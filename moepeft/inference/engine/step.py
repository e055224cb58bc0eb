# SPDX-License-Identifier: Apache-2.0
"""One step of the answers under way: a token for each row, by its settings."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from moepeft.core.types import Array
from moepeft.inference.api import TokenLogprob
from moepeft.inference.engine import row_sampler
from moepeft.inference.engine.limits import at_least
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.prefill import Reader
from moepeft.inference.engine.sequence import Running, experts_of, top_of


def step(
  core: ModelRunner, reader: Reader, rows: Sequence[Running]
) -> list[TokenLogprob | Exception]:
  """The next token of each row, or what went wrong with that row alone."""
  n = at_least(core.settings.batches, len(rows))
  # A place that no row has computes the first once more.
  filled = [*rows, *[rows[0]] * (n - len(rows))]
  said = core.step(
    n,
    at_least(core.rooms, max(map(reader.need, rows))),
    np.stack([row.held.row for row in filled]),
    np.array([row.slot.number for row in filled], np.int32),
    *reader.inputs(filled),
  )
  # While the device computes, the host looks for what may come next.
  asked = [
    _ask(core, row, logits)
    for row, logits in zip(rows, said.logits, strict=False)
  ]
  experts = said.experts if any(r.request.routing for r in rows) else {}
  found = _Found(
    *jax.device_get(
      (
        [None if isinstance(a, Exception) else a for a in asked],
        (said.tokens, said.logprobs, said.finite, experts),
      )
    )
  )
  return [
    error if isinstance(error, Exception) else _scored(found, i, row)
    for i, (row, error) in enumerate(zip(rows, asked, strict=True))
  ]


@dataclasses.dataclass(frozen=True)
class _Found:
  """Arrays on the host: of each row, (drawn or (), alternatives or ()); and
  of all, (tokens, log-probabilities, finite, experts)."""

  own: list
  all: tuple


def _ask(core: ModelRunner, row: Running, raw: Array) -> tuple | Exception:
  """What a row asks for beyond the most probable token: (a token and its log-
  probability, or (); alternatives, or ())."""
  request = row.request
  try:
    edited = _edited(core, row, raw)
  except Exception as e:
    return e
  drawn = best = ()
  if edited is not raw or request.sampling.temperature:
    s, v = request.sampling, core.model.config.vocab
    how = row_sampler.draw_of(s, request.seed, len(row.answer), v)
    sorts = s.top_k is not None or s.top_p is not None
    name = 'draw_filtered' if sorts else 'draw'
    drawn = core.programs[(name,)](raw, edited, how)
  if request.logprobs:
    best = core.programs[('best',)](raw)
  return drawn, best


def _edited(core: ModelRunner, row: Running, raw: Array) -> Array:
  """Logits that the row chooses from."""
  constraint, v = row.request.constraint, raw.shape[1]
  if constraint is None and row.seen is None:
    return raw
  allowed, seen = np.ones(v, bool), np.zeros(v, bool)
  if constraint is not None:
    mask = constraint.mask()[:v]
    # The model's vocabulary may be padded.
    allowed[: len(mask)], allowed[len(mask) :] = mask, False
    if not allowed.any():
      raise ValueError('the constraint allows no token at all')
  if row.seen is not None:
    seen = row.seen
  penalty = np.float32(row.request.sampling.repetition_penalty or 1)
  args = row_sampler.pack(allowed), row_sampler.pack(seen), penalty
  return core.programs[('edit',)](raw, *args)


def _scored(found: _Found, i: int, row: Running) -> TokenLogprob | Exception:
  tokens, logprobs, finite, experts = found.all
  if not finite[i]:
    return ArithmeticError(
      "the model's logits are no numbers: the adapter, or the base, is broken"
    )
  drawn, best = found.own[i]
  token, logprob = drawn if drawn else (tokens[i : i + 1], logprobs[i : i + 1])
  wanted = row.request.logprobs is not None
  return TokenLogprob(
    int(token[0]),
    float(logprob[0]) if wanted else None,
    top_of(best[0][0], best[1][0], row.request.logprobs) if best else (),
    experts_of(experts, i, row),
  )
