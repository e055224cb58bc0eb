# SPDX-License-Identifier: Apache-2.0
"""The columns of a table of runs, in the table's words."""

from collections.abc import Sequence

from moepeft.evaluation.paper_measure import AVERAGE, EIGHT, ROUNDS
from moepeft.evaluation.results import HELD_OUT
from moepeft.evaluation.tables.aggregate import AFTER, MEAN, Key
from moepeft.evaluation.tables.render import Column

PARAMETERS = Column('parameters', 'parameters', 'count')
PERCENT = Column('percent', '% of base', 'share')
SEEDS = Column('seeds', 'seeds', 'count')


def columns(keys: Sequence[Key]) -> list[Column]:
  """A column for each key, with a name of its own."""
  several = len({k.data for k in keys if k.dataset in EIGHT}) > 1
  found = []
  for key in keys:
    kind = 'loss' if key.measure == 'loss' else 'score'
    better = 'lower' if key.measure == 'loss' else 'higher'
    found.append(Column(key, _name(key, several), kind, better))
  return found


def _name(key: Key, several: bool) -> str:
  measure = key.measure.replace('_', ' ')
  if key.data == HELD_OUT and not key.dataset:
    return f'held-out {measure}'
  if _is_group(key):
    name = key.dataset.replace('_', '-')
    return name if measure == 'accuracy' else f'{name} {measure}'
  if key.dataset in ('', MEAN):
    return f'{key.data} {measure}'
  name = key.dataset if measure == 'accuracy' else f'{key.dataset} {measure}'
  return f'{name} ({key.data})' if several else name


def _is_group(key: Key) -> bool:
  """Whether a column is of a group of tasks, named by the group."""
  papers = (*EIGHT, *ROUNDS, AVERAGE)
  return key.data == AFTER or (
    key.data == HELD_OUT and key.dataset not in papers
  )
