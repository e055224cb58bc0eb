# SPDX-License-Identifier: Apache-2.0
"""Odds ratio preference optimization, without a reference (Hong et al.,
arXiv:2403.07691)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Batch, Tree
from moepeft.objectives import paired_batch
from moepeft.objectives.objective import ObjectiveSpec, check_options


@dataclasses.dataclass(frozen=True)
class ORPOSettings:
  """Settings of config.preference.

  Attributes:
    beta: weight of the odds-ratio loss, lambda in the paper.

  Raises:
    ValueError: a value is out of range; the message names its key.
  """

  beta: float = option(0.1, Range(0, 1_000, above=True))

  def __post_init__(self):
    check_options(self, 'preference')


def loss_sums(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: ORPOSettings,
) -> tuple[Array, dict[str, Tree]]:
  """As `dpo.loss_sums`; a reward is beta times the mean log p over tokens."""
  beta = settings.beta
  pairs, chosen, rejected, metrics = paired_batch.mean_logp_pairs(
    apply, variables, batch, rngs, beta
  )
  losses = orpo_loss(chosen, rejected, beta)
  # No SFT term: the loss already contains the chosen answer's likelihood.
  return paired_batch.total_loss(pairs, losses, 0.0, metrics, pairs.mask)


ORPO = ObjectiveSpec(
  loss_fn=loss_sums, settings=ORPOSettings, section='preference', batch='pair'
)


def log_odds(mean_logps: Array) -> Array:
  """log(p / (1 - p)) of p = exp(mean log p): [b].

  p is at most 1 - 2^-24, because p = 1 has no finite odds.
  """
  clipped = jnp.minimum(mean_logps, -(2.0**-24))
  return clipped - jnp.log(-jnp.expm1(clipped))


def orpo_loss(chosen: Array, rejected: Array, beta: float = 0.1) -> Array:
  """-chosen - beta log sigma(log odds(chosen) - log odds(rejected)): [b].

  The first term is the mean over each answer's tokens; in TRL it is one mean
  over all tokens of a batch, including prompts.

  Args:
    chosen, rejected: mean log p over the tokens of an answer, [b].
  """
  log_odds_ratio = log_odds(chosen) - log_odds(rejected)
  return -chosen - beta * jax.nn.log_sigmoid(log_odds_ratio)
