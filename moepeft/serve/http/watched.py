# SPDX-License-Identifier: Apache-2.0
"""A constraint whose failure is told from the engine's own."""

import numpy as np

from moepeft.inference.api import Constraint


class Watched:
  """A `Constraint` that remembers why it could not go on.

  A grammar may turn out too complex only when an answer has come far: this is
  the request's fault, while the engine says no more than that it failed.

  Attributes:
    reason: a sentence; '' while all is well.
  """

  def __init__(self, constraint: Constraint):
    self._constraint, self.reason = constraint, ''

  def mask(self) -> np.ndarray:
    try:
      return self._constraint.mask()
    except ValueError as e:
      self.reason = str(e)
      raise

  def accept(self, token: int) -> bool:
    try:
      return self._constraint.accept(token)
    except ValueError as e:
      self.reason = str(e)
      raise
