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
    beta: the factor of the mean log p over tokens.
    margin: the target margin divided by beta.
    label_smoothing: the assumed probability that a label is flipped.
    sft_weight: weight of the mean -log p over the chosen answer's tokens.

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
  """As `dpo.loss_sums`; a reward is beta times the mean log p over tokens."""
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

  gamma in the paper, and `simpo_gamma` in TRL, is beta times `margin`. The
  paper has beta from 2 up. Label smoothing is as in `dpo.sigmoid_loss`.

  Args:
    chosen, rejected: mean log p over the tokens of an answer, [b].
  """
  return sigmoid_loss(chosen - rejected - margin, beta, label_smoothing)
