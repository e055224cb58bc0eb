# SPDX-License-Identifier: Apache-2.0
"""Objectives: pure functions `(apply, variables, batch, rngs) -> (loss, aux)`.

A new one is one new file and one line in OBJECTIVES.
"""

from collections.abc import Callable

from moepeft.objectives import seq2seq

OBJECTIVES = {'seq2seq': seq2seq.objective}


def objective_of(name: str) -> Callable:
  """The objective that config.objective names.

  Raises:
    ValueError: there is no such objective.
  """
  if name not in OBJECTIVES:
    raise ValueError(
      f'config.objective is one of {", ".join(OBJECTIVES)}; got {name!r}'
    )
  return OBJECTIVES[name]
