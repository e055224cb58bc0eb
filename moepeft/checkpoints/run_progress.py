# SPDX-License-Identifier: Apache-2.0
"""A run's position in its data and its best validation loss."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class RunProgress:
  """Progress of a run, saved in each checkpoint beside its arrays.

  Attributes:
    place: for each host, the position of its next batch; see `Loader`.
    best: the lowest validation loss so far, None before the first.
    best_step: the step of the lowest validation loss.
    waited: the number of validations since.
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
    """Whether the last `patience` validations did not improve; 0: never."""
    return 0 < patience <= self.waited
