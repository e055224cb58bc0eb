# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimization (Rafailov et al., arXiv:2305.18290), and the
hinge, IPO and robust losses of the same pairs.

The log-ratio of an answer is log pi(y|x) - log pi_ref(y|x), summed over its
tokens; h is the chosen answer's log-ratio less the rejected one's. Papers are
cited without numbers of equations, which differ between their versions.
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
    beta: weight of a log-ratio.
    label_smoothing: the share of pairs whose order is taken to be wrong.
    sft_weight: weight of the chosen answer's mean -log p of a token, by answer
      as in Pang et al., arXiv:2404.19733 (TRL: of all tokens of a batch).

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
        'config.preference.label_smoothing is of the losses sigmoid and '
        f'robust; with {self.loss!r} it does nothing, set it to 0'
      )
    if self.loss == 'robust' and not self.label_smoothing:
      raise ValueError(
        "config.preference.loss='robust' without label_smoothing is 'sigmoid'; "
        'set config.preference.label_smoothing to the share of wrong labels'
      )


def loss_sums(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: DPOSettings,
  reference: paired_batch.ReferenceFn | None = None,
) -> tuple[Array, dict[str, Tree]]:
  """Sums the losses of pairs, and statistics of them.

  Args:
    apply: the policy's.
    variables: {'params': ..., 'peft': ...}, and the reference's own.
    batch: a model's batch twice, its keys after 'chosen_' and 'rejected_',
      packed or not (a pair has the same segment on both sides), and
      'chosen_reference' and 'rejected_reference' [b, t] where they were
      computed before training.
    rngs: as of `seq2seq.loss_sums`; the reference never gets any.
    reference: for batches without reference arrays.

  Returns:
    The sum, and {'weight': pairs; 'tokens', 'nll', 'correct': of the chosen
    answers, as of `seq2seq.loss_sums`; 'metrics': {name: [sum, count]} of
    rewards_chosen, rewards_rejected (beta times an answer's log-ratio),
    margins, accuracies, and kl (half the squared log-ratio of a token, the
    mean over both answers: to second order the divergence of policy and
    reference where answers are the reference's; never negative); 'routing'}.
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
  """The loss that the settings name: [a, 2], [a, 2] -> [a]."""
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
  """The loss that flipped labels leave unbiased: [b].

  Source: Chowdhury et al., arXiv:2403.00409: ((1 - s) L(h) - s L(-h)) /
  (1 - 2 s), L the sigmoid loss; each comparison is the wrong way round with
  probability s.
  """
  s = label_smoothing
  right, wrong = sigmoid_loss(h, beta), sigmoid_loss(-h, beta)
  return ((1 - s) * right - s * wrong) / (1 - 2 * s)


def hinge_loss(h: Array, beta: float = 0.1) -> Array:
  """max(0, 1 - beta h): [b].

  Source: Liu et al., arXiv:2309.06657: the loss of SLiC (Zhao et al.,
  arXiv:2305.10425, without a reference there) of log-ratios.
  """
  return jax.nn.relu(1 - beta * h)


def ipo_loss(mean_h: Array, beta: float = 0.1) -> Array:
  """(h - 1 / (2 beta))^2: [b].

  Source: Azar et al., arXiv:2310.12036, whose tau is beta and whose h is of
  sums. Here as in TRL, which asked the authors, it is of means over each
  answer's tokens: the target 1 / (2 beta) then does not ask more of a short
  answer's token than of a long one's.

  Args:
    mean_h: the chosen's mean log-ratio less the rejected's.
  """
  return (mean_h - 1 / (2 * beta)) ** 2
