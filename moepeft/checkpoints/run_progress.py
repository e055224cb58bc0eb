# SPDX-License-Identifier: Apache-2.0
"""A run's place in its data and its best validation, kept in checkpoints."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class RunProgress:
  """Progress of a run, saved in each checkpoint beside its arrays.

  Attributes:
    place: for each host, where its next batch begins (`Loader.place`).
    best: the least validation loss so far, None before the first.
    best_step: the step that it was of.
    waited: validations since.
  """

  place: tuple[tuple[int, int], ...] = ()
  best: float | None = None
  best_step: int = 0
  waited: int = 0

  def after_validation(self, loss: float, step: int) -> 'RunProgress':
    """The progress after a validation."""
    if math.isfinite(loss) and (self.best is None or loss < self.best):
      return dataclasses.replace(self, best=loss, best_step=step, waited=0)
    return dataclasses.replace(self, waited=self.waited + 1)

  def is_patience_exhausted(self, patience: int) -> bool:
    """Whether `patience` validations in a row brought nothing; 0: never."""
    return 0 < patience <= self.waited
