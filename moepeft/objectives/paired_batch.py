# SPDX-License-Identifier: Apache-2.0
"""Batches with several sides: 'chosen_inputs' and 'rejected_inputs'.

The sides of a row are adjacent rows in the model's batch, so that one pass
computes all of them. A row has one answer per side. A packed row has several,
in the same order on each side and with different segments, at most as many as
it has targets. Shapes: k sides; a the maximum number of answers per side, b, or
b t in packed batches.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from moepeft.core.types import PAIR, Array, Batch, Tree
from moepeft.objectives.cross_entropy import token_losses

# The token whose logit is a reward model's score: padding.
SCORE_TOKEN = 0
# The float32 rounding error of a token's log-ratio in nats: an ulp of 32.
_ROUNDING_ERROR = 4e-6
# The keys of a side that models and objectives read.
SIDE_KEYS = (
  'inputs',
  'inputs_mask',
  'inputs_segments',
  'inputs_positions',
  'inputs_tasks',
  'decoder_inputs',
  'targets',
  'targets_mask',
  'targets_segments',
  'targets_tasks',
)
# (variables, rows of sides joined) -> log p of each target, [k b, t].
ReferenceFn = Callable[[Tree, Batch], Array]


@dataclasses.dataclass(frozen=True)
class PairLogps:
  """Log-likelihoods of the answers of each side, as sums over an answer.

  Attributes:
    logps: float32 [a, k], the sum over an answer's targets.
    log_ratios: `logps` minus the reference's; None without a reference.
    squared_log_ratios: [a, k], sums of the squares of each target's log-ratio;
      None without a reference.
    tokens: int [a, k], targets of each answer.
    mask: bool [a], whether there is an answer on every side; else padding.
    correct: int [a, k], number of targets that are the most probable token.
    scores: float32 [a, k], the logit of SCORE_TOKEN after each answer's last
      token but one; see `reward`.
    routing: router statistics of every site.
  """

  logps: Array
  log_ratios: Array | None
  squared_log_ratios: Array | None
  tokens: Array
  mask: Array
  correct: Array
  scores: Array
  routing: Tree

  @property
  def lengths(self) -> Array:
    """Targets of each answer, at least 1: [a, k]."""
    return jnp.maximum(self.tokens, 1)

  def mean_logps(self, side: int) -> Array:
    """Mean log p of an answer's tokens: [a]."""
    return self.logps[:, side] / self.lengths[:, side]


def answer_lengths(batch: Batch, side: str) -> Array:
  """Targets of the answers in each row of a side: int [b, 1], packed [b, t]."""
  mask = batch[f'{side}targets_mask']
  segments = batch.get(f'{side}targets_segments')
  return _sum_answers(mask.astype(jnp.int32), segments)


def _sum_answers(values: Array, segments: Array | None) -> Array:
  """Sums over the tokens of each answer: [n, t] -> [n, 1], packed [n, t]."""
  if segments is None:
    return jnp.sum(values, axis=-1, keepdims=True)
  # Segment 0 is padding, and a row has no more answers than tokens.
  sums = jax.vmap(
    lambda x, ids: jax.ops.segment_sum(x, ids, num_segments=x.size + 1)
  )(values, segments)
  return sums[:, 1:]


def stack_sides(batch: Batch, sides: Sequence[str]) -> Batch:
  """{'chosen_inputs': [b, t], ...} -> {'inputs': [b k, t], ...}.

  The sides of a row are neighbors, which one device holds.
  """
  rows = {}
  for key in SIDE_KEYS:
    if sides[0] + key in batch:
      parts = [batch[side + key] for side in sides]
      stacked = jnp.stack(parts, axis=1)
      rows[key] = stacked.reshape(-1, *stacked.shape[2:])
  return rows


def token_logps(logits: Array, rows: Batch) -> Array:
  """log p of each target, 0 where there is none: [b, t]."""
  logps = -token_losses(logits, rows['targets'])
  return jnp.where(rows['targets_mask'], logps, 0)


def last_token_score(
  logits: Array, mask: Array, segments: Array | None = None
) -> Array:
  """The logit of SCORE_TOKEN at the last target of each answer.

  In a row without targets it is the logit at the first position. The shape is
  [n, 1], packed [n, t].

  Args:
    logits: [n, t, v].
    mask: of the targets, bool [n, t].
    segments: int [n, t] of packed rows.
  """
  positions = jnp.where(mask, jnp.arange(mask.shape[-1]), 0)
  if segments is None:
    last = jnp.max(positions, axis=-1, keepdims=True)
  else:
    last = jax.vmap(
      lambda x, ids: jax.ops.segment_max(x, ids, num_segments=x.size + 1)
    )(positions, segments)[:, 1:]
  # `segment_max` of an empty segment is the smallest integer.
  last = jnp.maximum(last, 0)
  return jnp.take_along_axis(logits[..., SCORE_TOKEN], last, axis=-1)


def answer_logps(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: Mapping[str, Array] | None,
  sides: Sequence[str],
  reference: ReferenceFn | None = None,
) -> PairLogps:
  """Runs the model on all sides, and the reference if there is one.

  If `batch` has precomputed log-probabilities of the reference,
  'chosen_reference' [b, t], they are used instead of `reference`.
  """
  rows = stack_sides(batch, sides)
  logits, sown = apply(
    variables, rows, train=rngs is not None, rngs=rngs, mutable=['routing']
  )
  logps = token_logps(logits, rows)
  mask, segments = rows['targets_mask'], rows.get('targets_segments')
  correct = (jnp.argmax(logits, axis=-1) == rows['targets']) & mask

  def split_sides(values: Array) -> Array:
    """[b k, answers of a row] -> [a, k]."""
    by_row = values.reshape(-1, len(sides), values.shape[-1])
    return by_row.swapaxes(1, 2).reshape(-1, len(sides))

  log_ratios = squared_log_ratios = None
  reference_logps = _precomputed_logps(batch, sides, mask)
  if reference_logps is None and reference is not None:
    reference_logps = jax.lax.stop_gradient(reference(variables, rows))
  if reference_logps is not None:
    # Differences are taken per token, then summed. A difference of sums over
    # hundreds of tokens has a rounding error as large as the first update.
    token_ratios = logps - reference_logps
    log_ratios = split_sides(_sum_answers(token_ratios, segments))
    squared_log_ratios = split_sides(
      _sum_answers(jnp.square(token_ratios), segments)
    )
  tokens = split_sides(_sum_answers(mask.astype(jnp.int32), segments))
  return PairLogps(
    logps=split_sides(_sum_answers(logps, segments)),
    log_ratios=log_ratios,
    squared_log_ratios=squared_log_ratios,
    tokens=tokens,
    mask=jnp.all(tokens > 0, axis=-1),
    correct=split_sides(_sum_answers(correct.astype(jnp.int32), segments)),
    scores=split_sides(last_token_score(logits, mask, segments)),
    routing=sown.get('routing', {}),
  )


def mean_logp_pairs(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: Mapping[str, Array] | None,
  beta: float,
) -> tuple[PairLogps, Array, Array, dict[str, Array]]:
  """(pairs, chosen, rejected, metrics) for objectives without a reference.

  `chosen` and `rejected` [a] are mean log p of an answer's tokens; a reward is
  beta times that.
  """
  pairs = answer_logps(apply, variables, batch, rngs, PAIR)
  chosen, rejected = pairs.mean_logps(0), pairs.mean_logps(1)
  metrics = pair_metrics(beta * chosen, beta * rejected, pairs.mask)
  return pairs, chosen, rejected, metrics


def _precomputed_logps(
  batch: Batch, sides: Sequence[str], mask: Array
) -> Array | None:
  """The reference's log p in a batch, 0 except on targets: [b k, t]."""
  if f'{sides[0]}reference' not in batch:
    return None
  stacked = jnp.stack([batch[f'{s}reference'] for s in sides], axis=1)
  return jnp.where(mask, stacked.reshape(mask.shape), 0)


def total_loss(
  answers: PairLogps,
  losses: Array,
  sft_weight: float,
  metrics: dict[str, Array],
  is_good: Array,
) -> tuple[Array, dict[str, Tree]]:
  """Returns (sum, aux) of an objective with a loss per answer or pair.

  Args:
    losses: [a].
    sft_weight: weight of the mean -log p over a good answer's tokens.
    metrics: {name: `metric_sums`}; 'kl' is added if there is a reference.
    is_good: bool [a], whether the answer on the first side is good; the SFT
      loss, 'tokens', 'nll' and 'correct' are of good answers only.
  """
  mask, good = answers.mask, answers.mask & is_good
  if sft_weight:
    losses = losses - sft_weight * jnp.where(good, answers.mean_logps(0), 0)
  if answers.squared_log_ratios is not None:
    squares = 0.5 * jnp.sum(answers.squared_log_ratios, axis=1)
    tokens = jnp.sum(answers.tokens, axis=1)
    metrics = metrics | {'kl': metric_sums(squares, mask, tokens)}
  return jnp.sum(jnp.where(mask, losses, 0)), {
    'weight': jnp.sum(mask),
    'tokens': jnp.sum(jnp.where(good, answers.tokens[:, 0], 0)),
    'nll': -jnp.sum(jnp.where(good, answers.logps[:, 0], 0)),
    'correct': jnp.sum(jnp.where(good, answers.correct[:, 0], 0)),
    'metrics': metrics,
    'routing': answers.routing,
  }


def metric_sums(values: Array, mask: Array, counts: Array | int = 1) -> Array:
  """[sum of values, sum of counts] over a mask; microbatches add up."""
  counts = jnp.broadcast_to(counts, values.shape)
  stacked = jnp.stack([values, counts.astype(values.dtype)])
  return jax.lax.stop_gradient(jnp.sum(jnp.where(mask, stacked, 0), axis=1))


def pair_metrics(
  chosen: Array, rejected: Array, mask: Array, tie: Array | float = 0.0
) -> dict[str, Array]:
  """Metrics of pairs' rewards [a].

  Args:
    tie: the largest margin that counts as a tie, see `wins`.
  """
  margins = chosen - rejected
  return {
    'rewards_chosen': metric_sums(chosen, mask),
    'rewards_rejected': metric_sums(rejected, mask),
    'margins': metric_sums(margins, mask),
    'accuracies': metric_sums(wins(margins, tie), mask),
  }


def wins(margins: Array, tie: Array | float) -> Array:
  """1 for a margin above `tie`, 0 for one below -`tie`, 0.5 for a tie: [b]."""
  return 0.5 * (1 + jnp.sign(jnp.where(jnp.abs(margins) > tie, margins, 0)))


def tie_threshold(answers: PairLogps) -> Array:
  """The rounding error of an answer's log-ratios: [a].

  Policy and reference are two programs, so equal models differ by rounding.
  """
  return _ROUNDING_ERROR * jnp.sum(answers.lengths, axis=-1)
