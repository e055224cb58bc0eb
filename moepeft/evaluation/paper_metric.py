# SPDX-License-Identifier: Apache-2.0
"""The paper's metric: medians over prompts, and their mean over datasets.

A task's score is the median of the accuracies of its prompts. ANLI's score is
the mean of its three rounds' scores. The average is over eight datasets.
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
  """The score of a dataset, in the unit of the results.

  Attributes:
    value: the median over prompts, or a mean of medians.
    low, high: its 95 % bootstrap interval; None if a result has no scores by
      example, or a task has only one example.
    majority: the score of always predicting a prompt's most frequent label;
      None if a result has none.
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
  """The score of each dataset of one run, with 'average' last.

  The three rounds of ANLI, if complete, are replaced by 'anli'. If all tasks
  are the paper's, there is an 'average' only of all eight datasets; otherwise
  it is the mean of all datasets.

  Raises:
    ValueError: a prompt occurs twice.
  """
  tasks = _results_by_task(rows, metric)
  values = _by_dataset(
    {k: _median([r.value for r in v]) for k, v in tasks.items()}
  )
  majorities = _by_dataset(
    {
      name: _median([r.majority for r in results])
      for name, results in tasks.items()
      if all(r.majority is not None for r in results)
    }
  )
  dataset_draws = _dataset_draws(tasks, draws, seed)
  result = {}
  for name, value in values.items():
    low, high = None, None
    if name in dataset_draws:
      low, high = bootstrap.interval(dataset_draws[name])
    # The averages of values and of majorities must be over the same datasets.
    comparable = name != AVERAGE or majorities.keys() == values.keys()
    majority = majorities.get(name) if comparable else None
    result[name] = Score(value, low, high, majority)
  return result


def draws(
  rows: Iterable[Result],
  metric: str = ACCURACY,
  draws: int = bootstrap.DRAWS,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Bootstrap draws [draws] of each score that has a confidence interval.

  Draw i resamples the same examples for all runs that were evaluated on the
  same examples, so that draws can be subtracted for paired comparisons.

  Raises:
    ValueError: a prompt occurs twice.
  """
  return _dataset_draws(_results_by_task(rows, metric), draws, seed)


def _results_by_task(
  rows: Iterable[Result], metric: str
) -> dict[str, list[Result]]:
  """A metric's results by task, with prompts sorted by name.

  Sorting makes sums independent of the order of the results.
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


def _dataset_draws(
  tasks: dict[str, list[Result]], count: int, seed: int
) -> dict[str, np.ndarray]:
  """Draws of the scores of datasets; {} for results without scores by example.

  All draws of a task with one example are equal, so neither that task nor a
  mean over it has draws.
  """
  task_draws = {}
  for name, results in tasks.items():
    if any(row.each is None for row in results):
      return {}
    each, weights = bootstrap.table(
      *zip(*[(r.idx, r.each, r.weights) for r in results], strict=True)
    )
    prompt_draws = bootstrap.means(each, weights, name, count, seed)
    # NumPy's median of NaNs takes ten times as long.
    has_nan = np.isnan(prompt_draws).any()
    median = np.nanmedian if has_nan else np.median
    task_draws[name] = median(prompt_draws, axis=1)
  excluded = {name for name, rows in tasks.items() if _has_one_example(rows)}
  if excluded & {*ROUNDS}:
    excluded.add('anli')
  if excluded:
    excluded.add(AVERAGE)
  return {k: v for k, v in _by_dataset(task_draws).items() if k not in excluded}


def _has_one_example(rows: Sequence[Result]) -> bool:
  return len({i for row in rows for i in row.idx}) < 2


def _by_dataset(tasks: dict) -> dict:
  """Values or draws of tasks -> those of datasets, with their average."""
  datasets = dict(tasks)
  if all(name in datasets for name in ROUNDS):
    anli = _mean([datasets.pop(name) for name in ROUNDS])
    datasets = {'anli': anli} | datasets
  is_paper = set(datasets) <= {*EIGHT, *ROUNDS}
  if datasets and (not is_paper or set(datasets) == set(EIGHT)):
    order = EIGHT if is_paper else sorted(datasets)
    datasets = {name: datasets[name] for name in order}
    datasets[AVERAGE] = _mean(list(datasets.values()))
  return datasets


def _mean(values: Sequence):
  mean = np.mean(np.stack(values), axis=0)
  return mean if mean.ndim else float(mean)


def _median(values: Sequence[float]) -> float:
  return float(np.median(values))
