# SPDX-License-Identifier: Apache-2.0
"""Chooses values, such as a learning rate, on validation before seeds are run.

Trials that differ only in the selected keys and the seed are a group. The
group's first seed is run with all values; the value with the lowest validation
loss is run with the other seeds. Results on test rows are not read.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.core.ranges import suggestion
from moepeft.runs.metrics_log import is_number
from moepeft.sweeps.results import FAILED, FINISHED
from moepeft.sweeps.trials import Trial

SEED = 'seed'


@dataclasses.dataclass(frozen=True)
class Choice:
  """Whether a trial is run, and whether its values are the best.

  Attributes:
    chosen: whether it has the values with the lowest validation loss; None
      before all values are measured.
    runs: whether it is run: True, False, or None before that is known.
    why: the losses, in words.
  """

  chosen: bool | None
  runs: bool | None
  why: str = ''


def parse_keys(text: str, trials: Sequence[Trial]) -> tuple[str, ...]:
  """The keys of --select.

  Raises:
    ValueError: a key is not in the grid, or is the seed.
  """
  keys = tuple(
    key.strip().removeprefix('config.') for key in text.split(',') if key
  )
  in_grid = list(dict.fromkeys(key for t in trials for key in t.settings))
  for key in keys:
    if key == SEED:
      raise ValueError(
        '--select names the keys whose values are chosen before the seeds are '
        f'run; {SEED} is none of them'
      )
    if key not in in_grid:
      raise ValueError(
        f'--select={key}: the grid has no such key, only '
        f'{", ".join(in_grid)}{suggestion(key, in_grid)}'
      )
  return keys


def choose(
  trials: Sequence[Trial],
  rows: Mapping[str, Mapping[str, Any]],
  keys: Sequence[str],
) -> dict[str, Choice]:
  """{name: its choice} of all trials.

  Args:
    rows: {name: row}, from `results.read_row`.
    keys: the selected keys; without any, all trials are run.
  """
  if not keys:
    return {trial.name: Choice(None, True) for trial in trials}
  groups = collections.defaultdict(list)
  for trial in trials:
    groups[_without(trial, (*keys, SEED))].append(trial)
  choices = {}
  for group in groups.values():
    choices |= _choose_in_group(group, rows, keys)
  return choices


def count_runs(
  trials: Sequence[Trial],
  choices: Mapping[str, Choice],
  keys: Sequence[str],
) -> int:
  """The number of trials that are run in all; of undecided ones, one value."""
  decided = sum(choices[t.name].runs is True for t in trials)
  undecided = [t for t in trials if choices[t.name].runs is None]
  return decided + len({_without(t, keys) for t in undecided})


def _choose_in_group(
  group: Sequence[Trial],
  rows: Mapping[str, Mapping[str, Any]],
  keys: Sequence[str],
) -> dict[str, Choice]:
  seed = group[0].settings.get(SEED)
  candidates = [t for t in group if t.settings.get(SEED) == seed]
  later = [t for t in group if t.settings.get(SEED) != seed]
  if any(rows[t.name]['status'] not in (FINISHED, FAILED) for t in candidates):
    return {t.name: Choice(None, True) for t in candidates} | {
      t.name: Choice(None, None) for t in later
    }
  losses = {_values(t, keys): _loss(rows[t.name]) for t in candidates}
  listed = ', '.join(
    f'{_text(values)}: {"failed" if loss == math.inf else f"{loss:.6g}"}'
    for values, loss in losses.items()
  )
  where = f'of {", ".join(keys)}' + (
    '' if seed is None else f' with seed {seed}'
  )
  group_name = ', '.join(
    f'{k}={v}' for k, v in group[0].settings.items() if k not in (*keys, SEED)
  )
  group_name += ': ' if group_name else ''
  best = min(losses, key=losses.get)
  if losses[best] == math.inf:
    why = f'{group_name}no value {where} has a validation loss ({listed})'
    return {t.name: Choice(False, t in candidates, why) for t in group}
  why = (
    f'{group_name}{_text(best)} has the lowest validation loss {where} '
    f'({listed})'
  )
  return {
    t.name: Choice(
      _values(t, keys) == best,
      t in candidates or _values(t, keys) == best,
      why,
    )
    for t in group
  }


def _loss(row: Mapping[str, Any]) -> float:
  loss = row.get('validation', {}).get('loss')
  return loss if is_number(loss) else math.inf


def _values(trial: Trial, keys: Sequence[str]) -> tuple:
  return tuple(trial.settings.get(key) for key in keys)


def _text(values: tuple) -> str:
  return ', '.join(map(str, values))


def _without(trial: Trial, keys: Sequence[str]) -> str:
  settings = {k: v for k, v in trial.settings.items() if k not in keys}
  return json.dumps(settings, sort_keys=True)
