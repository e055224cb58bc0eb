# SPDX-License-Identifier: Apache-2.0
"""What an objective is to the loop: sums, and what comes before them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from moepeft.core.types import Array, Batch, Tree

# (apply, variables, rows, rngs) -> (sum, aux).
Sums = Callable[..., tuple[Array, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised, and what a step computes of its batch before.

  Attributes:
    sums: (apply, variables, rows, rngs) -> (sum, aux), of any rows of a
      batch; see `moepeft.objectives`.
    rollout: (apply, variables, rows, rng) -> {name: array [rows, ...]}, put
      beside the rows of a batch before the gradient is taken, by the policy
      as it is then; None where there is nothing to put. rng is None in
      validation.
    settle: batch -> batch, of the whole batch with what `rollout` put there:
      what is a mean over rows belongs here, as `sums` sees some rows only.
  """

  sums: Sums
  rollout: Callable[..., dict[str, Array]] | None = None
  settle: Callable[[Batch], Batch] = lambda batch: batch

  def __call__(
    self, apply: Callable, variables: Tree, rows: Batch, rngs: Any
  ) -> tuple[Array, dict[str, Any]]:
    return self.sums(apply, variables, rows, rngs)

  def prepared(self, apply: Callable, variables: Tree, batch: Batch) -> Batch:
    """A batch as `sums` takes it, in evaluation: in one part, no noise."""
    if self.rollout is None:
      return batch
    return self.settle(batch | self.rollout(apply, variables, batch, None))
