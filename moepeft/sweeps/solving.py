# SPDX-License-Identifier: Apache-2.0
"""Solves the budgets and scales of trials, before the first of them is run."""

import json
from collections.abc import Sequence

from moepeft.checkpoints.solve_method import with_explicit_method
from moepeft.sweeps.trials import Trial

# Neither parameters nor FLOPs depend on them; trials often differ in no other.
_WITHOUT_EFFECT = ('seed', 'steps', 'optimizer')


def solve(trials: Sequence[Trial]) -> tuple[dict[str, str], dict[str, str]]:
  """({name: explicit method}, {name: error}) of the trials that ask for one.

  A trial solves its method again when it is run.
  """
  methods, errors, outcomes = {}, {}, {}
  for trial in trials:
    settings = json.loads(trial.config.to_json())
    for key in _WITHOUT_EFFECT:
      del settings[key]
    key = json.dumps(settings, sort_keys=True)
    if key not in outcomes:
      try:
        explicit = with_explicit_method(trial.config)
        solved = explicit.method if explicit is not trial.config else ''
        outcomes[key] = (methods, solved)
      except ValueError as error:
        outcomes[key] = (errors, str(error))
    group, text = outcomes[key]
    if text:
      group[trial.name] = text
  return methods, errors


def check(errors: dict[str, str]) -> None:
  """
  Raises:
    ValueError: there are errors; it has the first and names the others.
  """
  if errors:
    name, error = next(iter(errors.items()))
    other_names = ', '.join(list(errors)[1:])
    raise ValueError(
      f'--grid: nothing is run, as {name} cannot be solved: {error}'
      + (f' (nor can {other_names})' if other_names else '')
    )
