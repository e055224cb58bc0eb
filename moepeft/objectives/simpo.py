# SPDX-License-Identifier: Apache-2.0
"""Simple preference optimization, without a reference (Meng et al.,
arXiv:2405.14734)."""

import dataclasses
from collections.abc import Callable

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Batch, Tree
from moepeft.objectives import paired_batch
from moepeft.objectives.dpo import sigmoid_loss
from moepeft.objectives.objective import ObjectiveSpec, check_options


@dataclasses.dataclass(frozen=True)
class SimPOSettings:
  """Settings of config.preference.

  Attributes:
    beta: weight of the mean log p of a token.
    margin: the target margin, over beta.
    label_smoothing: the share of pairs whose order is taken to be wrong.
    sft_weight: weight of the chosen answer's mean -log p of a token.

  Raises:
    ValueError: a value is out of range; the message names its key.
  """

  beta: float = option(0.1, Range(0, 1_000, above=True))
  margin: float = option(0.5, Range(0, 1_000))
  label_smoothing: float = option(0.0, Range(0, 0.5, below=True))
  sft_weight: float = option(0.0, Range(0, 1_000))

  def __post_init__(self):
    check_options(self, 'preference')


def loss_sums(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: SimPOSettings,
) -> tuple[Array, dict[str, Tree]]:
  """As `dpo.loss_sums`; a reward is beta times the mean log p of a token."""
  beta = settings.beta
  pairs, chosen, rejected, metrics = paired_batch.mean_logp_pairs(
    apply, variables, batch, rngs, beta
  )
  losses = simpo_loss(
    chosen, rejected, beta, settings.margin, settings.label_smoothing
  )
  return paired_batch.total_loss(
    pairs, losses, settings.sft_weight, metrics, pairs.mask
  )


SIMPO = ObjectiveSpec(
  loss_fn=loss_sums, settings=SimPOSettings, section='preference', batch='pair'
)


def simpo_loss(
  chosen: Array,
  rejected: Array,
  beta: float = 0.1,
  margin: float = 0.5,
  label_smoothing: float = 0.0,
) -> Array:
  """-log sigma(beta (chosen - rejected - margin)): [b].

  The paper's gamma is beta times `margin` (TRL sets gamma itself: margin is
  simpo_gamma / beta); it uses beta 2 and more. Smoothed as DPO's loss is.

  Args:
    chosen, rejected: mean log p of an answer's tokens.
  """
  return sigmoid_loss(chosen - rejected - margin, beta, label_smoothing)
