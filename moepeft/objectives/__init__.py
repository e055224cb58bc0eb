# SPDX-License-Identifier: Apache-2.0
"""Objectives: pure functions `(apply, variables, batch, rngs) -> (sum, aux)`.

The sum is divided by aux['weight'], which depends on data alone: parts of a
batch add up to the whole. A new one is one new file and one line in
OBJECTIVES.
"""

import functools
from collections.abc import Callable

from moepeft.objectives import seq2seq
from moepeft.objectives.loss import PLAIN, Loss

OBJECTIVES = {'seq2seq': seq2seq.objective}


def objective_of(name: str, loss: Loss = PLAIN) -> Callable:
  """The objective that config.objective names, with what config.loss says.

  Raises:
    ValueError: there is no such objective.
  """
  if name not in OBJECTIVES:
    raise ValueError(
      f'config.objective is one of {", ".join(OBJECTIVES)}; got {name!r}'
    )
  return functools.partial(OBJECTIVES[name], loss=loss)
