# SPDX-License-Identifier: Apache-2.0
"""Answers judged one by one: KTO (Ethayarajh et al., arXiv:2402.01306)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import JUDGED, Array, Batch, Tree
from moepeft.objectives import paired_batch
from moepeft.objectives.objective import ObjectiveSpec, check_options

# A judged answer, and the answer to another prompt behind the same one.
_ANSWER, _MISMATCHED = JUDGED


@dataclasses.dataclass(frozen=True)
class KTOSettings:
  """Settings of config.preference.

  Attributes:
    beta: weight of a log-ratio.
    desirable_weight, undesirable_weight: those of good and of bad answers.
    sft_weight: weight of a good answer's mean -log p of a token.

  Raises:
    ValueError: a value is out of range; the message names its key.
  """

  beta: float = option(0.1, Range(0, 1_000, above=True))
  desirable_weight: float = option(1.0, Range(0, 1_000))
  undesirable_weight: float = option(1.0, Range(0, 1_000))
  sft_weight: float = option(0.0, Range(0, 1_000))

  def __post_init__(self):
    check_options(self, 'preference')


def prepare_rows(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rng: Array | None,
  reference: paired_batch.ReferenceFn | None = None,
) -> dict[str, Array]:
  """Computes the log-ratios of mismatched answers, without noise.

  Returns:
    {'kl_ratio': as 'label'}.
  """
  del rng
  answers = paired_batch.answer_logps(
    apply, variables, batch, None, (_MISMATCHED,), reference
  )
  log_ratios = answers.log_ratios[:, 0]
  return {'kl_ratio': log_ratios.reshape(batch['label'].shape)}


def prepare_batch(batch: Batch) -> Batch:
  """Returns the batch with its KL baseline beside every answer, 'z_ref'."""
  log_ratios = batch['kl_ratio']
  lengths = paired_batch.answer_lengths(batch, _ANSWER)
  z_ref = kl_baseline(log_ratios, (lengths > 0).reshape(log_ratios.shape))
  return batch | {'z_ref': jnp.broadcast_to(z_ref, log_ratios.shape)}


def loss_sums(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: KTOSettings,
  reference: paired_batch.ReferenceFn | None = None,
) -> tuple[Array, dict[str, Tree]]:
  """Sums the losses of answers, and statistics of them.

  Args:
    batch: a model's batch, 'label' bool [b] (packed: [b, t], of each segment
      from 1 on), 'z_ref' like it by `prepare_batch`, and 'reference' [b, t]
      where it was computed before training.
    apply, variables, rngs, reference: as of `dpo.loss_sums`.

  Returns:
    The sum, and aux as of `dpo.loss_sums`, its 'weight' counting answers.
    rewards_chosen is of good answers and rewards_rejected of bad ones;
    'margins' is the distance of a reward from the baseline, positive above it
    for a good answer and below it for a bad one; 'accuracies' is the share
    of positive margins, and 'z_ref' the baseline. 'nll' is of good answers.
  """
  answers = paired_batch.answer_logps(
    apply, variables, batch, rngs, (_ANSWER,), reference
  )
  beta = settings.beta
  label, z_ref = batch['label'].ravel(), batch['z_ref'].ravel()
  log_ratios, mask = answers.log_ratios[:, 0], answers.mask
  losses = kto_loss(
    log_ratios,
    label,
    z_ref,
    beta,
    settings.desirable_weight,
    settings.undesirable_weight,
  )
  margins = beta * jnp.where(label, log_ratios - z_ref, z_ref - log_ratios)
  wins = paired_batch.wins(margins, beta * paired_batch.tie_threshold(answers))
  metric_sums = paired_batch.metric_sums
  metrics = {
    'rewards_chosen': metric_sums(beta * log_ratios, mask & label),
    'rewards_rejected': metric_sums(beta * log_ratios, mask & ~label),
    'margins': metric_sums(margins, mask),
    'accuracies': metric_sums(wins, mask),
    'z_ref': metric_sums(z_ref, mask),
  }
  return paired_batch.total_loss(
    answers, losses, settings.sft_weight, metrics, label
  )


KTO = ObjectiveSpec(
  loss_fn=loss_sums,
  settings=KTOSettings,
  section='preference',
  batch='judged',
  needs_reference=True,
  prepare_rows=prepare_rows,
  prepare_batch=prepare_batch,
)


def kto_loss(
  log_ratios: Array,
  label: Array,
  z_ref: Array,
  beta: float = 0.1,
  desirable: float = 1.0,
  undesirable: float = 1.0,
) -> Array:
  """lambda (1 - sigma(+-beta (log-ratio - z_ref))): [b].

  Source: Ethayarajh et al., arXiv:2402.01306: lambda_y - v(x, y), which is
  not negative.

  Args:
    log_ratios: [b], of each answer, summed over its tokens.
    label: bool [b], whether it is a good one.
    z_ref: [] or [b], from `kl_baseline`; no gradient goes through it.
    desirable, undesirable: lambda of good and of bad answers.
  """
  gain = beta * (log_ratios - jax.lax.stop_gradient(z_ref))
  value = jax.nn.sigmoid(jnp.where(label, gain, -gain))
  return jnp.where(label, desirable, undesirable) * (1 - value)


def kl_baseline(log_ratios: Array, mask: Array) -> Array:
  """max(0, mean log-ratio) of mismatched answers, without gradient: [].

  An estimate of KL(pi || pi_ref) by answers to other prompts, as in
  arXiv:2402.01306 and TRL. Here it is of the whole batch, however many parts
  it is computed in (TRL: of each part), and a prompt's other answer is always
  the same one (TRL: of its neighbor in each batch).

  Args:
    log_ratios: [b], of each prompt with the answer to another.
    mask: bool [b], the rows that count.
  """
  total = jnp.sum(jnp.where(mask, log_ratios, 0))
  mean = total / jnp.maximum(jnp.sum(mask), 1)
  return jax.lax.stop_gradient(jnp.maximum(mean, 0))
