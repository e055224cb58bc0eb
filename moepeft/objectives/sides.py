# SPDX-License-Identifier: Apache-2.0
"""Batches with several sides: 'chosen_inputs' and 'rejected_inputs'.

The sides of a row are neighbours in one batch of the model, so that one pass
computes them all. Letter beyond the legend: k sides.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from moepeft.objectives.loss import token_losses
from moepeft.typing import Array, Batch, Tree

# The token whose logit a reward model's score is: padding's.
SCORE = 0
PAIR = ('chosen_', 'rejected_')
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
  """What a model says of the answers of each side.

  Attributes:
    log_p: float32 [b, k, t], of each target, 0 where it is not one.
    ratio: the same less the reference's; None without a reference.
    mask: bool [b, k, t], real targets.
    real: bool [b], rows with a target on every side; others fill a batch up.
    correct: [b, k], how many targets are the most probable.
    score: float32 [b, k], the logit of SCORE after each answer's last token
      but one; see `reward`.
    routing: sums of every site.
  """

  log_p: Array
  ratio: Array | None
  mask: Array
  real: Array
  correct: Array
  score: Array
  routing: Tree

  @property
  def lengths(self) -> Array:
    """Targets of each answer, at least 1: [b, k]."""
    return jnp.maximum(jnp.sum(self.mask, axis=-1), 1)

  def mean_log_p(self, side: int) -> Array:
    """Of an answer's tokens: [b]."""
    return jnp.sum(self.log_p[:, side], axis=-1) / self.lengths[:, side]

  def ratios(self) -> Array:
    """log pi(y|x) - log pi_ref(y|x) of each answer: [b, k].

    Differences of tokens are summed: a difference of sums of hundreds of
    tokens would be rounded by as much as a first step changes it.
    """
    return jnp.sum(self.ratio, axis=-1)


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


def score(logits: Array, mask: Array) -> Array:
  """The logit of SCORE at each row's last target: [b, t, v], [b, t] -> [b].

  At the first place where a row has no target.
  """
  last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[-1]), 0), axis=-1)
  own = logits[..., SCORE]
  return jnp.take_along_axis(own, last[..., None], axis=-1)[..., 0]


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
  apart = lambda a: a.reshape(-1, len(sides), *a.shape[1:])  # noqa: E731
  log_p = token_log_p(logits, rows)
  correct = (jnp.argmax(logits, axis=-1) == rows['targets']).astype(jnp.int32)
  mask = apart(rows['targets_mask'])
  ratio = None
  if f'{sides[0]}reference' in batch:
    given = jnp.stack([batch[f'{s}reference'] for s in sides], axis=1)
    ratio = apart(log_p) - jnp.where(mask, given, 0)
  elif reference is not None:
    ratio = apart(log_p - jax.lax.stop_gradient(reference(variables, rows)))
  return Seen(
    log_p=apart(log_p),
    ratio=ratio,
    mask=mask,
    real=jnp.all(jnp.any(mask, axis=-1), axis=-1),
    correct=jnp.sum(apart(correct) * mask, axis=-1),
    score=apart(score(logits, rows['targets_mask'])),
    routing=seen.get('routing', {}),
  )


def totals(
  seen: Seen, losses: Array, sft: float, figures: dict, good: Array
) -> tuple[Array, dict[str, Tree]]:
  """(sum, aux) of an objective that has a loss for each row.

  Args:
    losses: [b].
    sft: times the mean -log p of a good answer's tokens is added to its loss.
    figures: of `figure`, by name; 'kl' is added where there is a reference.
    good: bool [b], rows whose first side is an answer to learn; the others'
      likelihood is not told.
  """
  real, good = seen.real, seen.real & good
  if sft:
    losses = losses - sft * jnp.where(good, seen.mean_log_p(0), 0)
  if seen.ratio is not None:
    squares = 0.5 * jnp.sum(jnp.square(seen.ratio), axis=(1, 2))
    tokens = jnp.sum(seen.mask, axis=(1, 2))
    figures['kl'] = figure(squares, real, tokens)
  return jnp.sum(jnp.where(real, losses, 0)), {
    'weight': jnp.sum(real),
    'tokens': jnp.sum(seen.mask[:, 0] & good[:, None]),
    'nll': -jnp.sum(jnp.where(good[:, None], seen.log_p[:, 0], 0)),
    'correct': jnp.sum(jnp.where(good, seen.correct[:, 0], 0)),
    'figures': figures,
    'routing': seen.routing,
  }


def figure(values: Array, real: Array, counts: Array | int = 1) -> Array:
  """[sum of values, sum of counts] over real rows: parts of a batch add up."""
  counts = jnp.broadcast_to(counts, values.shape)
  both = jnp.stack([values, counts.astype(values.dtype)])
  return jax.lax.stop_gradient(jnp.sum(jnp.where(real, both, 0), axis=1))


def compared(
  chosen: Array, rejected: Array, real: Array, tie: Array | float = 0.0
) -> dict[str, Array]:
  """Figures of pairs' rewards [b].

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
  """What a row's log-ratios may differ from 0 by where nothing does: [b].

  Policy and reference are two programs, so equal ones are rounded apart.
  """
  return _ROUNDING * jnp.sum(seen.lengths, axis=-1)
