# SPDX-License-Identifier: Apache-2.0
"""Batches with several sides: 'chosen_inputs' and 'rejected_inputs'.

The sides of a row are neighbours in one batch of the model, so that one pass
computes them all. A row of each side holds one answer, or where rows are
packed several in the same order, told apart by their segments: there may be
as many as a row has targets. Letters beyond the legend: k sides, a answers
that a batch has room for on each of them, b or where rows are packed b t.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Batch, Tree
from moepeft.objectives.cross_entropy import token_losses

# The token whose logit a reward model's score is: padding's.
SCORE = 0
# Of a token's log-ratio in float32, in nats: an ulp of a logit of 32.
_ROUNDING = 4e-6
# What of a side the models and objectives read.
KEYS = (
  'inputs',
  'inputs_mask',
  'inputs_segments',
  'inputs_positions',
  'decoder_inputs',
  'targets',
  'targets_mask',
  'targets_segments',
)
# (variables, rows of sides joined) -> log p of each target, [k b, t].
LogP = Callable[[Tree, Batch], Array]


@dataclasses.dataclass(frozen=True)
class Seen:
  """What a model says of the answers of each side, as sums over an answer.

  Attributes:
    log_p: float32 [a, k], of an answer's targets.
    ratio: the same less the reference's; None without a reference.
    squares: [a, k], of the ratios of its targets, squared; as `ratio`.
    tokens: int [a, k], targets of each answer.
    real: bool [a], whether there is one on every side; others fill up.
    correct: int [a, k], how many targets are the most probable.
    score: float32 [a, k], the logit of SCORE after each answer's last token
      but one; see `reward`.
    routing: sums of every site.
  """

  log_p: Array
  ratio: Array | None
  squares: Array | None
  tokens: Array
  real: Array
  correct: Array
  score: Array
  routing: Tree

  @property
  def lengths(self) -> Array:
    """Targets of each answer, at least 1: [a, k]."""
    return jnp.maximum(self.tokens, 1)

  def mean_log_p(self, side: int) -> Array:
    """Of an answer's tokens: [a]."""
    return self.log_p[:, side] / self.lengths[:, side]


def answers(batch: Batch, side: str) -> Array:
  """Targets of the answers in each row of a side: int [b, 1], packed [b, t]."""
  mask = batch[f'{side}targets_mask']
  segments = batch.get(f'{side}targets_segments')
  return _sums(mask.astype(jnp.int32), segments)


def _sums(values: Array, segments: Array | None) -> Array:
  """Sums over the tokens of each answer: [n, t] -> [n, 1], packed [n, t]."""
  if segments is None:
    return jnp.sum(values, axis=-1, keepdims=True)
  # Segment 0 is padding, and a row has no more answers than tokens.
  found = jax.vmap(
    lambda x, ids: jax.ops.segment_sum(x, ids, num_segments=x.size + 1)
  )(values, segments)
  return found[:, 1:]


def joined(batch: Batch, sides: Sequence[str]) -> Batch:
  """{'chosen_inputs': [b, t], ...} -> {'inputs': [b k, t], ...}.

  The sides of a row are neighbours, which one device holds.
  """
  found = {}
  for key in KEYS:
    if sides[0] + key in batch:
      parts = [batch[side + key] for side in sides]
      stacked = jnp.stack(parts, axis=1)
      found[key] = stacked.reshape(-1, *stacked.shape[2:])
  return found


def token_log_p(logits: Array, rows: Batch) -> Array:
  """log p of each target, 0 where it is not one: [b, t]."""
  found = -token_losses(logits, rows['targets'])
  return jnp.where(rows['targets_mask'], found, 0)


def score(logits: Array, mask: Array, segments: Array | None = None) -> Array:
  """The logit of SCORE at each answer's last target: [n, 1], packed [n, t].

  At the first place where there is no target.

  Args:
    logits: [n, t, v]; mask: of the targets, bool [n, t].
    segments: int [n, t] of packed rows.
  """
  places = jnp.where(mask, jnp.arange(mask.shape[-1]), 0)
  if segments is None:
    last = jnp.max(places, axis=-1, keepdims=True)
  else:
    last = jax.vmap(
      lambda x, ids: jax.ops.segment_max(x, ids, num_segments=x.size + 1)
    )(places, segments)[:, 1:]
  # Of no token at all the maximum is the least number there is.
  last = jnp.maximum(last, 0)
  return jnp.take_along_axis(logits[..., SCORE], last, axis=-1)


def see(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: Mapping[str, Array] | None,
  sides: Sequence[str],
  reference: LogP | None = None,
) -> Seen:
  """One pass over all sides, and one of the reference if there is one.

  The reference's log-likelihoods are those of `batch`, as
  'chosen_reference' [b, t], where it has them (computed before training).
  """
  rows = joined(batch, sides)
  logits, seen = apply(
    variables, rows, train=rngs is not None, rngs=rngs, mutable=['routing']
  )
  log_p = token_log_p(logits, rows)
  mask, segments = rows['targets_mask'], rows.get('targets_segments')
  correct = (jnp.argmax(logits, axis=-1) == rows['targets']) & mask

  def apart(found: Array) -> Array:
    """[b k, answers of a row] -> [a, k]."""
    by_row = found.reshape(-1, len(sides), found.shape[-1])
    return by_row.swapaxes(1, 2).reshape(-1, len(sides))

  ratio = squares = None
  given = _given(batch, sides, mask)
  if given is None and reference is not None:
    given = jax.lax.stop_gradient(reference(variables, rows))
  if given is not None:
    # Differences of tokens are summed: a difference of sums of hundreds of
    # tokens would be rounded by as much as a first step changes it.
    ratio = apart(_sums(log_p - given, segments))
    squares = apart(_sums(jnp.square(log_p - given), segments))
  tokens = apart(_sums(mask.astype(jnp.int32), segments))
  return Seen(
    log_p=apart(_sums(log_p, segments)),
    ratio=ratio,
    squares=squares,
    tokens=tokens,
    real=jnp.all(tokens > 0, axis=-1),
    correct=apart(_sums(correct.astype(jnp.int32), segments)),
    score=apart(score(logits, mask, segments)),
    routing=seen.get('routing', {}),
  )


def _given(batch: Batch, sides: Sequence[str], mask: Array) -> Array | None:
  """The reference's log p that a batch brings, 0 beside targets: [b k, t]."""
  if f'{sides[0]}reference' not in batch:
    return None
  stacked = jnp.stack([batch[f'{s}reference'] for s in sides], axis=1)
  return jnp.where(mask, stacked.reshape(mask.shape), 0)


def totals(
  seen: Seen, losses: Array, sft: float, figures: dict, good: Array
) -> tuple[Array, dict[str, Tree]]:
  """(sum, aux) of an objective that has a loss for each answer or pair.

  Args:
    losses: [a].
    sft: times the mean -log p of a good answer's tokens is added to its loss.
    figures: of `figure`, by name; 'kl' is added where there is a reference.
    good: bool [a], those whose first side is an answer to learn; the others'
      likelihood is not told.
  """
  real, good = seen.real, seen.real & good
  if sft:
    losses = losses - sft * jnp.where(good, seen.mean_log_p(0), 0)
  if seen.ratio is not None:
    squares = 0.5 * jnp.sum(seen.squares, axis=1)
    figures['kl'] = figure(squares, real, jnp.sum(seen.tokens, axis=1))
  return jnp.sum(jnp.where(real, losses, 0)), {
    'weight': jnp.sum(real),
    'tokens': jnp.sum(jnp.where(good, seen.tokens[:, 0], 0)),
    'nll': -jnp.sum(jnp.where(good, seen.log_p[:, 0], 0)),
    'correct': jnp.sum(jnp.where(good, seen.correct[:, 0], 0)),
    'figures': figures,
    'routing': seen.routing,
  }


def figure(values: Array, real: Array, counts: Array | int = 1) -> Array:
  """[sum of values, sum of counts] of what is real: parts of a batch add up."""
  counts = jnp.broadcast_to(counts, values.shape)
  both = jnp.stack([values, counts.astype(values.dtype)])
  return jax.lax.stop_gradient(jnp.sum(jnp.where(real, both, 0), axis=1))


def compared(
  chosen: Array, rejected: Array, real: Array, tie: Array | float = 0.0
) -> dict[str, Array]:
  """Figures of pairs' rewards [a].

  Args:
    tie: up to what difference a pair is a tie, see `won`.
  """
  margins = chosen - rejected
  return {
    'rewards_chosen': figure(chosen, real),
    'rewards_rejected': figure(rejected, real),
    'margins': figure(margins, real),
    'accuracies': figure(won(margins, tie), real),
  }


def won(margins: Array, tie: Array | float) -> Array:
  """1 where a margin is above a tie, 0 where it is below; ties are half right,
  as by chance: [b]."""
  return 0.5 * (1 + jnp.sign(jnp.where(jnp.abs(margins) > tie, margins, 0)))


def rounding(seen: Seen) -> Array:
  """What a pair's log-ratios may differ from 0 by where nothing does: [a].

  Policy and reference are two programs, so equal ones are rounded apart.
  """
  return _ROUNDING * jnp.sum(seen.lengths, axis=-1)
