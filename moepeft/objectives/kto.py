# SPDX-License-Identifier: Apache-2.0
"""KTO: unpaired answers with a label (Ethayarajh et al., arXiv:2402.01306)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import JUDGED, Array, Batch, Tree
from moepeft.objectives import paired_batch
from moepeft.objectives.objective import ObjectiveSpec, check_options

# Key prefixes: the labelled answer, and the answer of another prompt.
_ANSWER, _MISMATCHED = JUDGED


@dataclasses.dataclass(frozen=True)
class KTOSettings:
  """Settings of config.preference.

  Attributes:
    beta: the factor of log-ratios.
    desirable_weight, undesirable_weight: weights of good and of bad answers.
    sft_weight: weight of the mean -log p over a good answer's tokens.

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
  """Computes the log-ratios of mismatched answers, without dropout.

  Returns:
    {'kl_ratio': array of the shape of 'label'}.
  """
  del rng
  answers = paired_batch.answer_logps(
    apply, variables, batch, None, (_MISMATCHED,), reference
  )
  log_ratios = answers.log_ratios[:, 0]
  return {'kl_ratio': log_ratios.reshape(batch['label'].shape)}


def prepare_batch(batch: Batch) -> Batch:
  """Adds 'z_ref', the KL baseline of the batch, in the shape of 'label'."""
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
  """Sums the losses and statistics of answers.

  Args:
    batch: a batch of the model with 'label' bool [b] (packed: [b, t], entry i
      for segment i + 1), 'z_ref' of the same shape from `prepare_batch`, and
      'reference' [b, t] if it was precomputed.
    apply, variables, rngs, reference: as in `dpo.loss_sums`.

  Returns:
    (sum, aux) as in `dpo.loss_sums`, where 'weight' is the number of answers
    and 'nll' is of good answers. Metrics: rewards_chosen of good answers and
    rewards_rejected of bad ones; margins, beta (log-ratio - z_ref) of good
    answers and minus that of bad ones; accuracies, the share of positive
    margins; z_ref.
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

  Source: Ethayarajh et al., arXiv:2402.01306, as lambda_y - v(x, y), which is
  never negative.

  Args:
    log_ratios: [b], the log-ratio of each answer, summed over its tokens.
    label: bool [b], whether the answer is good.
    z_ref: [] or [b], from `kl_baseline`; it gets no gradient.
    desirable, undesirable: lambda of good and of bad answers.
  """
  gain = beta * (log_ratios - jax.lax.stop_gradient(z_ref))
  value = jax.nn.sigmoid(jnp.where(label, gain, -gain))
  return jnp.where(label, desirable, undesirable) * (1 - value)


def kl_baseline(log_ratios: Array, mask: Array) -> Array:
  """max(0, mean log-ratio) of mismatched answers, without gradient: [].

  It estimates KL(pi || pi_ref) from answers to other prompts, as in
  arXiv:2402.01306 and TRL. The mean is over the whole batch (TRL: over each
  microbatch), and a prompt always has the same mismatched answer (TRL: that of
  its neighbor in the batch).

  Args:
    log_ratios: [b], of each prompt with the answer to another prompt.
    mask: bool [b], False on padding.
  """
  total = jnp.sum(jnp.where(mask, log_ratios, 0))
  mean = total / jnp.maximum(jnp.sum(mask), 1)
  return jax.lax.stop_gradient(jnp.maximum(mean, 0))
