# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation and its kin (Rafailov et al., 2305.18290)."""

from collections.abc import Callable

from moepeft.core.types import PAIR, Array, Batch, Tree
from moepeft.objectives import paired_batch, preference_losses
from moepeft.objectives.preference_losses import PLAIN, Preference


def objective(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: Preference = PLAIN,
  reference: paired_batch.LogP | None = None,
) -> tuple[Array, dict[str, Tree]]:
  """The sum of pairs' losses, and what was seen on the way.

  Args:
    apply: the policy's.
    variables: {'params': ..., 'peft': ...}, and the reference's own.
    batch: a model's batch twice, its keys after 'chosen_' and 'rejected_',
      packed or not (a pair has the same segment on both sides), and
      'chosen_reference' and 'rejected_reference' [b, t] where they were
      computed before.
    rngs: as of `seq2seq.objective`; the reference never gets any.
    settings: config.preference's.
    reference: where the batch does not bring it.

  Returns:
    The sum, and {'weight': pairs; 'tokens', 'nll', 'correct': of the chosen
    answers, as of `seq2seq.objective`; 'figures': {name: [sum, count]} of
    rewards_chosen, rewards_rejected (beta times the ratio of an answer),
    margins, accuracies, and kl (half the squared log-ratio of a token, the
    mean over both answers: to second order the divergence of policy and
    reference where answers are the reference's; never negative); 'routing'}.
  """
  seen = paired_batch.see(apply, variables, batch, rngs, PAIR, reference)
  ratios = seen.ratio
  losses = loss_of(ratios, ratios / seen.lengths, settings)
  rewards = settings.beta * ratios
  tie = settings.beta * paired_batch.rounding(seen)
  figures = paired_batch.compared(rewards[:, 0], rewards[:, 1], seen.real, tie)
  return paired_batch.totals(seen, losses, settings.sft, figures, seen.real)


def loss_of(ratios: Array, means: Array, settings: Preference) -> Array:
  """The loss that the settings name, of ratios (and their means) [a, 2]."""
  h, beta, smooth = (
    ratios[:, 0] - ratios[:, 1],
    settings.beta,
    settings.label_smoothing,
  )
  if settings.loss == 'hinge':
    return preference_losses.hinge(h, beta)
  if settings.loss == 'ipo':
    return preference_losses.ipo(means[:, 0] - means[:, 1], beta)
  if settings.loss == 'robust':
    return preference_losses.robust(h, beta, smooth)
  return preference_losses.dpo(h, beta, smooth)
