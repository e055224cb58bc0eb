# SPDX-License-Identifier: Apache-2.0
"""Trials that one vmapped step can train together."""

from collections.abc import Sequence

from moepeft.config import method_string, program
from moepeft.peft.methods import METHODS
from moepeft.sweeps.trials import Trial


def group(trials: Sequence[Trial], most: int) -> list[list[Trial]]:
  """Groups of trials whose training steps are one program, in their order.

  Args:
    most: the number of trials in a group.
  """
  groups: list[list[Trial]] = []
  open_groups: dict[str, list[Trial]] = {}
  for trial in trials:
    key = '' if why_alone(trial) else program.fingerprint(trial.config)
    members = open_groups.get(key) if key else None
    if members is None or len(members) == most:
      members = open_groups[key] = []
      groups.append(members)
    members.append(trial)
  return groups


def why_alone(trial: Trial) -> str:
  """The reason why a trial is trained in a process of its own; '' for none."""
  specs = method_string.parse_method(trial.method)
  if any(METHODS[spec.name].module is None for spec in specs):
    return f'{trial.method} trains the base, which trials of --vmap share'
  if trial.config.profile.steps:
    return "JAX's profiler traces one run (config.profile.steps)"
  return ''
