# SPDX-License-Identifier: Apache-2.0
"""A reward model of compared answers (Ouyang et al., arXiv:2203.02155).

The reward is a logit: that of token 0 after an answer's last token but one
(its end is not read), where the whole answer has been seen. It is RankT5's
choice (Zhuang et al., arXiv:2210.10634), the logit of a token that answers
never use, padding's: no head is added, so any method is a reward model, and
its adapter is all there is to keep.
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
  """As `dpo.loss_sums`; a reward is the logit itself."""
  del settings
  pairs = paired_batch.answer_logps(apply, variables, batch, rngs, PAIR)
  chosen, rejected = pairs.scores[:, 0], pairs.scores[:, 1]
  losses = bradley_terry_loss(chosen, rejected)
  metrics = paired_batch.pair_metrics(chosen, rejected, pairs.mask)
  return paired_batch.total_loss(pairs, losses, 0.0, metrics, pairs.mask)


REWARD = ObjectiveSpec(loss_fn=loss_sums, batch='pair')


def bradley_terry_loss(chosen: Array, rejected: Array) -> Array:
  """-log sigma(r_chosen - r_rejected): [b].

  Source: Ouyang et al., arXiv:2203.02155, of one pair a prompt: the
  likelihood of Bradley and Terry's model.
  """
  return -jax.nn.log_sigmoid(chosen - rejected)
