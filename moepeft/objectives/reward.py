# SPDX-License-Identifier: Apache-2.0
"""A reward model trained on pairs of answers (Ouyang et al., arXiv:2203.02155).

The reward of an answer is the logit of the padding token, id 0, at the position
that predicts the answer's last token. As in RankT5 (Zhuang et al.,
arXiv:2210.10634), the logit of an otherwise unused token replaces a new head,
so a reward model is an adapter of any method.
"""

from collections.abc import Callable

import jax

from moepeft.core.types import PAIR, Array, Batch, Tree
from moepeft.objectives import paired_batch
from moepeft.objectives.objective import NoSettings, ObjectiveSpec


def loss_sums(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: NoSettings,
) -> tuple[Array, dict[str, Tree]]:
  """As `dpo.loss_sums`; a reward is the logit."""
  del settings
  pairs = paired_batch.answer_logps(apply, variables, batch, rngs, PAIR)
  chosen, rejected = pairs.scores[:, 0], pairs.scores[:, 1]
  losses = bradley_terry_loss(chosen, rejected)
  metrics = paired_batch.pair_metrics(chosen, rejected, pairs.mask)
  return paired_batch.total_loss(pairs, losses, 0.0, metrics, pairs.mask)


REWARD = ObjectiveSpec(loss_fn=loss_sums, batch='pair')


def bradley_terry_loss(chosen: Array, rejected: Array) -> Array:
  """-log sigma(r_chosen - r_rejected): [b].

  Source: Ouyang et al., arXiv:2203.02155, with one pair per prompt. It is the
  negative log-likelihood of the Bradley-Terry model.
  """
  return -jax.nn.log_sigmoid(chosen - rejected)
