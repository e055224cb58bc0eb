# SPDX-License-Identifier: Apache-2.0
"""The paper's metric: medians over prompts, and their mean over datasets.

The accuracy of each prompt; its median over the prompts of a task; ANLI is
the mean of its three rounds' medians; the average is over eight datasets.
Source: arXiv:2309.05444, section 3.2 and table 1.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from moepeft.evaluation import bootstrap
from moepeft.evaluation.results import ACCURACY, Result

ROUNDS = ('anli_r1', 'anli_r2', 'anli_r3')
EIGHT = ('anli', 'cb', 'rte', 'wsc', 'wic', 'copa', 'winogrande', 'hellaswag')
AVERAGE = 'average'


@dataclasses.dataclass(frozen=True)
class Score:
  """One cell of the grid, in the units of the rows.

  Attributes:
    value: median over prompts, or a mean of such.
    low, high: ends of its 95 % bootstrap interval; None where a row has no
      figures by example, or a task has one example only.
    majority: the same of always giving a prompt's most frequent label; None
      where the rows have none.
  """

  value: float
  low: float | None
  high: float | None
  majority: float | None


def scores(
  rows: Iterable[Result],
  metric: str = ACCURACY,
  draws: int = bootstrap.DRAWS,
  seed: int = 0,
) -> dict[str, Score]:
  """A score for every dataset of one run, and 'average' at the end.

  Where all tasks are the paper's, 'average' needs all eight datasets; where
  others are there too, it is the mean of all that are there. The rounds of
  ANLI become 'anli' where all three are there.

  Raises:
    ValueError: a prompt occurs twice.
  """
  tasks = _tasks(rows, metric)
  values = _grid({k: _median([r.value for r in v]) for k, v in tasks.items()})
  majorities = _grid(
    {
      name: _median([r.majority for r in results])
      for name, results in tasks.items()
      if all(r.majority is not None for r in results)
    }
  )
  drawn = _draws(tasks, draws, seed)
  result = {}
  for name, value in values.items():
    low, high = None, None
    if name in drawn:
      low, high = bootstrap.interval(drawn[name])
    # An average of fewer tasks than the values' would be something else.
    whole = name != AVERAGE or majorities.keys() == values.keys()
    majority = majorities.get(name) if whole else None
    result[name] = Score(value, low, high, majority)
  return result


def draws(
  rows: Iterable[Result],
  metric: str = ACCURACY,
  draws: int = bootstrap.DRAWS,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Bootstrap draws [draws] of every score; none where a row has no figures
  by example, or any task of a score has one example only.

  Draw i of two runs resamples the same examples where the runs were evaluated
  on the same ones, so the draws of their difference are the differences of
  their draws.

  Raises:
    ValueError: a prompt occurs twice.
  """
  return _draws(_tasks(rows, metric), draws, seed)


def _tasks(rows: Iterable[Result], metric: str) -> dict[str, list[Result]]:
  """Rows of a metric by task, as they come, prompts in order of their names.

  The order of tasks and prompts then changes no sum.
  """
  tables: dict[str, dict[str, Result]] = collections.defaultdict(dict)
  for row in rows:
    if row.metric != metric:
      continue
    if row.prompt in tables[row.task]:
      earlier = tables[row.task][row.prompt]
      raise ValueError(
        f'the prompt {row.prompt!r} of {row.task!r} has two rows of {metric}, '
        f'of {earlier.run!r} and {row.run!r}; give the rows of one run and one '
        'evaluation'
      )
    tables[row.task][row.prompt] = row
  return {
    task: [prompts[name] for name in sorted(prompts)]
    for task, prompts in tables.items()
  }


def _draws(
  tasks: dict[str, list[Result]], count: int, seed: int
) -> dict[str, np.ndarray]:
  """Draws of all tasks with scores by example, and of their means.

  A task of one example is the same in every draw, which says nothing of how
  certain it is: neither it nor a mean with it has draws.
  """
  drawn_by_task = {}
  for name, results in tasks.items():
    if any(row.each is None for row in results):
      # The average has no draws then either.
      return {}
    each, weights = bootstrap.table(
      *zip(*[(r.idx, r.each, r.weights) for r in results], strict=True)
    )
    drawn = bootstrap.means(each, weights, name, count, seed)
    drawn_by_task[name] = np.nanmedian(drawn, axis=1)
  lacking = {name for name, results in tasks.items() if _single(results)}
  if lacking & {*ROUNDS}:
    lacking.add('anli')
  if lacking:
    lacking.add(AVERAGE)
  return {k: v for k, v in _grid(drawn_by_task).items() if k not in lacking}


def _single(rows: Sequence[Result]) -> bool:
  """Whether all is of one example, so that there is no interval."""
  return len({i for row in rows for i in row.idx}) < 2


def _grid(tasks: dict) -> dict:
  """Tasks' figures, numbers or draws, as datasets', with their average."""
  cells = dict(tasks)
  if all(name in cells for name in ROUNDS):
    rounds = _mean([cells[name] for name in ROUNDS])
    cells = {'anli': rounds} | {
      name: value for name, value in cells.items() if name not in ROUNDS
    }
  papers = set(cells) <= {*EIGHT, *ROUNDS}
  if cells and (not papers or set(cells) == set(EIGHT)):
    order = EIGHT if papers else sorted(cells)
    cells = {name: cells[name] for name in order}
    cells[AVERAGE] = _mean(list(cells.values()))
  return cells


def _mean(values: Sequence):
  mean = np.mean(np.stack(values), axis=0)
  return mean if mean.ndim else float(mean)


def _median(values: Sequence[float]) -> float:
  """The middle one, or the mean of the middle two."""
  return float(np.median(values))
