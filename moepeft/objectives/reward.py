# SPDX-License-Identifier: Apache-2.0
"""A reward model of compared answers (Ouyang et al., arXiv:2203.02155).

The reward is a logit: that of token 0 after an answer's last token but one
(its end is not read), where the whole answer has been seen. It is RankT5's
choice (Zhuang et al., arXiv:2210.10634), the logit of a token that answers
never use, padding's: no head is added, so any method is a reward model, and
its adapter is all there is to keep.
"""

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
) -> tuple[Array, dict[str, Tree]]:
  """As `dpo.objective`; a reward is the logit itself."""
  seen = paired_batch.see(apply, variables, batch, rngs, PAIR)
  chosen, rejected = seen.score[:, 0], seen.score[:, 1]
  losses = preference_losses.reward(chosen, rejected)
  figures = paired_batch.compared(chosen, rejected, seen.real)
  return paired_batch.totals(seen, losses, settings.sft, figures, seen.real)
