# SPDX-License-Identifier: Apache-2.0
"""Pairs without a reference: SimPO (2405.14734) and ORPO (2403.07691)."""

from collections.abc import Callable

from moepeft.core.types import PAIR, Array, Batch, Tree
from moepeft.objectives import paired_batch, preference_losses
from moepeft.objectives.preference_losses import PLAIN, Preference


def simpo(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: Preference = PLAIN,
) -> tuple[Array, dict[str, Tree]]:
  """As `dpo.objective`; a reward is beta times the mean log p of a token."""
  s = settings
  return _objective(
    lambda w, r: preference_losses.simpo(
      w, r, s.beta, s.margin, s.label_smoothing
    ),
    paired_batch.see(apply, variables, batch, rngs, PAIR),
    settings,
  )


def orpo(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: Preference = PLAIN,
) -> tuple[Array, dict[str, Tree]]:
  """As `simpo`; the chosen's likelihood is a term of the loss itself."""
  return _objective(
    lambda w, r: preference_losses.orpo(w, r, settings.beta),
    paired_batch.see(apply, variables, batch, rngs, PAIR),
    settings,
  )


def _objective(loss, seen: paired_batch.Seen, settings: Preference):
  chosen, rejected = seen.mean_log_p(0), seen.mean_log_p(1)
  beta = settings.beta
  figures = paired_batch.compared(beta * chosen, beta * rejected, seen.real)
  losses = loss(chosen, rejected)
  return paired_batch.totals(seen, losses, settings.sft, figures, seen.real)
