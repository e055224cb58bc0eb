# SPDX-License-Identifier: Apache-2.0
"""Answers judged one by one: KTO (Ethayarajh et al., arXiv:2402.01306)."""

from collections.abc import Callable

import jax.numpy as jnp

from moepeft.core.types import Array, Batch, Tree
from moepeft.objectives import paired_batch, preference_losses
from moepeft.objectives.preference_losses import PLAIN, Preference

OWN, MISMATCHED = ('',), ('kl_',)


def rollout(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rng: Array | None,
  reference: paired_batch.LogP | None = None,
) -> dict[str, Array]:
  """{'kl_ratio': as 'label'} of each prompt with another's answer, without
  noise."""
  del rng
  seen = paired_batch.see(apply, variables, batch, None, MISMATCHED, reference)
  return {'kl_ratio': seen.ratio[:, 0].reshape(batch['label'].shape)}


def settle(batch: Batch) -> Batch:
  """The batch with its reference point beside every answer, as 'point'."""
  ratios = batch['kl_ratio']
  real = (paired_batch.answers(batch, OWN[0]) > 0).reshape(ratios.shape)
  point = preference_losses.reference_point(ratios, real)
  return batch | {'point': jnp.broadcast_to(point, ratios.shape)}


def objective(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: Preference = PLAIN,
  reference: paired_batch.LogP | None = None,
) -> tuple[Array, dict[str, Tree]]:
  """The sum of answers' losses, and what was seen on the way.

  Args:
    batch: a model's batch, 'label' bool [b] (packed: [b, t], of each segment
      from 1 on), 'point' like it by `settle`, and 'reference' [b, t] where it
      was computed before.
    others: as of `dpo.objective`.

  Returns:
    The sum, and aux as of `dpo.objective`, its 'weight' counting answers.
    rewards_chosen is of good answers and rewards_rejected of bad ones;
    'margins' are of both, what a reward is above the point for a good one and
    below it for a bad one; 'accuracies' the share with a positive one, and
    'point' the reference point. 'nll' is of the good answers.
  """
  seen = paired_batch.see(apply, variables, batch, rngs, OWN, reference)
  s, label, point = settings, batch['label'].ravel(), batch['point'].ravel()
  ratio = seen.ratio[:, 0]
  losses = preference_losses.kto(
    ratio, label, point, s.beta, s.desirable, s.undesirable
  )
  good, bad = seen.real & label, seen.real & ~label
  margins = s.beta * jnp.where(label, ratio - point, point - ratio)
  tie = s.beta * paired_batch.rounding(seen)
  figures = {
    'rewards_chosen': paired_batch.figure(s.beta * ratio, good),
    'rewards_rejected': paired_batch.figure(s.beta * ratio, bad),
    'margins': paired_batch.figure(margins, seen.real),
    'accuracies': paired_batch.figure(
      paired_batch.won(margins, tie), seen.real
    ),
    'point': paired_batch.figure(point, seen.real),
  }
  return paired_batch.totals(seen, losses, s.sft, figures, label)
