# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization (Rafailov et al., arXiv:2305.18290), with its
sigmoid loss or a hinge, IPO or robust loss.

The log-ratio of an answer is log pi(y|x) - log pi_ref(y|x), summed over its
tokens. h is the log-ratio of the chosen answer minus that of the rejected one.
Equation numbers are not cited, because they differ between paper versions.
"""

import dataclasses
from collections.abc import Callable

import jax

from moepeft.core.ranges import Choices, Range, option
from moepeft.core.types import PAIR, Array, Batch, Tree
from moepeft.objectives import paired_batch
from moepeft.objectives.objective import ObjectiveSpec, check_options

LOSSES = ('sigmoid', 'hinge', 'ipo', 'robust')


@dataclasses.dataclass(frozen=True)
class DPOSettings:
  """Settings of config.preference.

  Attributes:
    loss: one of LOSSES.
    beta: the factor of log-ratios.
    label_smoothing: the assumed probability that a label is flipped.
    sft_weight: weight of the mean -log p over the chosen answer's tokens, per
      answer as in Pang et al., arXiv:2404.19733 (TRL: over a batch's tokens).

  Raises:
    ValueError: a value is out of range; the message names its key.
  """

  loss: str = option('sigmoid', Choices(LOSSES))
  beta: float = option(0.1, Range(0, 1_000, above=True))
  label_smoothing: float = option(0.0, Range(0, 0.5, below=True))
  sft_weight: float = option(0.0, Range(0, 1_000))

  def __post_init__(self):
    check_options(self, 'preference')
    if self.label_smoothing and self.loss in ('hinge', 'ipo'):
      raise ValueError(
        'config.preference.label_smoothing has no effect on the loss '
        f'{self.loss!r}, only on sigmoid and robust; set it to 0'
      )
    if self.loss == 'robust' and not self.label_smoothing:
      raise ValueError(
        "config.preference.loss='robust' without label_smoothing is 'sigmoid'; "
        'set config.preference.label_smoothing to the share of flipped labels'
      )


def loss_sums(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: DPOSettings,
  reference: paired_batch.ReferenceFn | None = None,
) -> tuple[Array, dict[str, Tree]]:
  """Sums the losses and statistics of pairs.

  Args:
    apply: the policy model's `apply`.
    variables: {'params': ..., 'peft': ...}, and 'reference' if there is one.
    batch: two batches of the model, with the key prefixes 'chosen_' and
      'rejected_'; if packed, a pair has the same segment in both. If they were
      precomputed, also 'chosen_reference' and 'rejected_reference' [b, t].
    rngs: as in `seq2seq.loss_sums`; the reference gets none.
    reference: the reference, for batches without reference arrays.

  Returns:
    (sum, aux). aux is {'weight': the number of pairs; 'tokens', 'nll',
    'correct': as in `seq2seq.loss_sums`, of the chosen answers; 'routing';
    'metrics'}. The metrics are rewards_chosen and rewards_rejected (beta times
    the log-ratio), margins, accuracies, and kl: half the squared log-ratio per
    token, over both answers. It is never negative, and to second order the KL
    divergence of policy and reference if the reference sampled the answers.
  """
  pairs = paired_batch.answer_logps(
    apply, variables, batch, rngs, PAIR, reference
  )
  losses = pair_losses(
    pairs.log_ratios, pairs.log_ratios / pairs.lengths, settings
  )
  rewards = settings.beta * pairs.log_ratios
  tie = settings.beta * paired_batch.tie_threshold(pairs)
  metrics = paired_batch.pair_metrics(
    rewards[:, 0], rewards[:, 1], pairs.mask, tie
  )
  return paired_batch.total_loss(
    pairs, losses, settings.sft_weight, metrics, pairs.mask
  )


DPO = ObjectiveSpec(
  loss_fn=loss_sums,
  settings=DPOSettings,
  section='preference',
  batch='pair',
  needs_reference=True,
)


def pair_losses(
  log_ratios: Array, mean_log_ratios: Array, settings: DPOSettings
) -> Array:
  """The loss of each pair by `settings.loss`: [a, 2], [a, 2] -> [a]."""
  h = log_ratios[:, 0] - log_ratios[:, 1]
  beta, smoothing = settings.beta, settings.label_smoothing
  if settings.loss == 'hinge':
    return hinge_loss(h, beta)
  if settings.loss == 'ipo':
    return ipo_loss(mean_log_ratios[:, 0] - mean_log_ratios[:, 1], beta)
  if settings.loss == 'robust':
    return robust_loss(h, beta, smoothing)
  return sigmoid_loss(h, beta, smoothing)


def sigmoid_loss(
  h: Array, beta: float = 0.1, label_smoothing: float = 0.0
) -> Array:
  """-(1 - s) log sigma(beta h) - s log sigma(-beta h): [b].

  Source: Rafailov et al., arXiv:2305.18290; with s > 0 the conservative form
  of Mitchell, 'A note on DPO with noisy preferences and relationship to IPO'.
  """
  s = label_smoothing
  log_sigma = jax.nn.log_sigmoid
  return -(1 - s) * log_sigma(beta * h) - s * log_sigma(-beta * h)


def robust_loss(
  h: Array, beta: float = 0.1, label_smoothing: float = 0.0
) -> Array:
  """An unbiased estimate of the sigmoid loss under flipped labels: [b].

  Source: Chowdhury et al., arXiv:2403.00409: ((1 - s) L(h) - s L(-h)) /
  (1 - 2 s), where L is the sigmoid loss and s the probability that a label is
  flipped.
  """
  s = label_smoothing
  loss, flipped_loss = sigmoid_loss(h, beta), sigmoid_loss(-h, beta)
  return ((1 - s) * loss - s * flipped_loss) / (1 - 2 * s)


def hinge_loss(h: Array, beta: float = 0.1) -> Array:
  """max(0, 1 - beta h): [b].

  Source: Liu et al., arXiv:2309.06657: SLiC's loss (Zhao et al.,
  arXiv:2305.10425, which has no reference model) on log-ratios.
  """
  return jax.nn.relu(1 - beta * h)


def ipo_loss(mean_h: Array, beta: float = 0.1) -> Array:
  """(h - 1 / (2 beta))^2: [b].

  Source: Azar et al., arXiv:2310.12036, with tau for beta and log-ratios summed
  over tokens. Here they are means over tokens, as in TRL after a question to
  the authors, so that the target 1 / (2 beta) does not depend on the length.

  Args:
    mean_h: the mean log-ratio of the chosen answer minus that of the rejected.
  """
  return (mean_h - 1 / (2 * beta)) ** 2
