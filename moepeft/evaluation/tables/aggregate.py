# SPDX-License-Identifier: Apache-2.0
"""From rows to the figures of a table: of a run, of seeds, of differences."""

import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from moepeft import tasks
from moepeft.evaluation import bootstrap, paper_metric
from moepeft.evaluation.paper_metric import AVERAGE, EIGHT, ROUNDS
from moepeft.evaluation.results import (
  ACCURACY,
  HELD_OUT,
  LOSS,
  Result,
  metric_info,
  metric_names,
)
from moepeft.evaluation.tables.run_results import RunResults

# The data of what after.json says of a run's own groups of tasks.
AFTER = 'after'
# The dataset of a mean over tasks that are not the paper's.
MEAN = 'mean'
# With fewer seeds Student's interval is many times as wide as they are apart
# (of two, 9 times): there is none.
_STUDENTS_SEEDS = 5
# How an interval was made.
EXAMPLES = 'the percentile bootstrap over examples'
SEEDS_AND_EXAMPLES = (
  'the percentile bootstrap over seeds and examples, each resampled by itself '
  '(Owen, 2007)'
)
STUDENT = "Student's t over seeds (not over examples)"


class ColumnKey(NamedTuple):
  """The key of a column; dataset '' for all of the data together."""

  data: str
  metric: str
  dataset: str


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A value with its 95 % interval, fractions in per cent.

  Attributes:
    value: the figure.
    low, high: ends of the interval; None where there is none.
    majority: of always giving the most frequent answer, or None.
    seeds: the figure of each seed where it is a mean over several.
    how: EXAMPLES, SEEDS_AND_EXAMPLES or STUDENT, where there is an interval.
  """

  value: float
  low: float | None = None
  high: float | None = None
  majority: float | None = None
  seeds: tuple[float, ...] = ()
  interval_method: str = dataclasses.field(default='', compare=False)


def estimates_of(entry: RunResults) -> dict[ColumnKey, Estimate]:
  """All figures of one run, or of a base."""
  estimates = {}
  for key, rows in results_by_column(entry):
    if key.metric == LOSS:
      estimates[key] = _pooled_figure(rows)
      continue
    scale = metric_info(key.metric).factor
    for name, score in paper_metric.scores(rows, key.metric).items():
      if (named := _named(key, name)) is not None:
        estimates[named] = _scaled(score, scale)
  loss = ColumnKey(HELD_OUT, LOSS, '')
  if loss not in estimates and entry.loss is not None:
    estimates[loss] = Estimate(entry.loss)
  for name, value in entry.means.items():
    estimates[ColumnKey(AFTER, ACCURACY, name)] = Estimate(100 * value)
  return estimates


def draws_of(entry: RunResults) -> dict[ColumnKey, np.ndarray]:
  """Bootstrap draws of the figures that have an interval, likewise scaled."""
  draws = {}
  for key, rows in results_by_column(entry):
    if key.metric == LOSS:
      if not _single(rows):
        draws[key] = _pooled(rows)
      continue
    scale = metric_info(key.metric).factor
    for name, drawn in paper_metric.draws(rows, key.metric).items():
      if (named := _named(key, name)) is not None:
        draws[named] = scale * drawn
  return draws


def mean_over_seeds(
  runs: Sequence[Mapping[ColumnKey, Estimate]],
  draws: Mapping[ColumnKey, np.ndarray] = types.MappingProxyType({}),
) -> dict[ColumnKey, Estimate]:
  """Means over runs that differ by seed, of the figures that all of them have.

  Of one run, its own figures. Of several, the interval is that of `draws`;
  where there are none (figures that are not kept by example), Student's over
  five or more runs, cut to the values that the metric can have, and none over
  fewer.

  Args:
    draws: from `mean_draws` of the same runs.
  """
  if len(runs) == 1:
    return dict(runs[0])
  means = {}
  for key in runs[0]:
    if all(key in run for run in runs):
      values = np.array([run[key].value for run in runs])
      mean = float(values.mean())
      low, high, interval_method = None, None, ''
      if key in draws:
        (low, high), interval_method = (
          bootstrap.interval(draws[key]),
          SEEDS_AND_EXAMPLES,
        )
      elif len(values) >= _STUDENTS_SEEDS:
        half, interval_method = student(values), STUDENT
        least, most = metric_info(key.metric).bounds
        low, high = max(mean - half, least), min(mean + half, most)
      majorities = [run[key].majority for run in runs]
      # Examples may depend on the seed, and with them what is frequent.
      majority = None if None in majorities else float(np.mean(majorities))
      seeds = tuple(values.tolist())
      means[key] = Estimate(mean, low, high, majority, seeds, interval_method)
  return means


def student(values: np.ndarray) -> float:
  """Half of the 95 % interval of a mean: t sd / sqrt(n), n - 1 degrees."""
  n = len(values)
  deviation = np.std(values, ddof=1)
  return float(special.stdtrit(n - 1, 0.975) * deviation / np.sqrt(n))


def differences(
  estimates_and_draws: tuple[
    Mapping[ColumnKey, Estimate], Mapping[ColumnKey, np.ndarray]
  ],
  baseline: tuple[Mapping[ColumnKey, Estimate], Mapping[ColumnKey, np.ndarray]],
) -> dict[ColumnKey, Estimate]:
  """Ours less the baseline's, with intervals over the same resamples.

  Args:
    ours, baseline: figures from `over_seeds` and draws from `mean_draws`.
  """
  result = {}
  for key in estimates_and_draws[0].keys() & baseline[0].keys():
    low = high = None
    if key in estimates_and_draws[1] and key in baseline[1]:
      low, high = bootstrap.interval(
        estimates_and_draws[1][key] - baseline[1][key]
      )
    result[key] = Estimate(
      estimates_and_draws[0][key].value - baseline[0][key].value, low, high
    )
  return result


def mean_draws(entries: Sequence[RunResults]) -> dict[ColumnKey, np.ndarray]:
  """Draws of the mean over seeds, where all of them have draws.

  Draw i resamples the examples, the same ones for every seed, and the seeds.
  """
  drawn = [draws_of(e) for e in sorted(entries, key=lambda e: e.seed)]
  weights = bootstrap.seed_weights(len(drawn))
  return {
    key: np.einsum('is,si->i', weights, [draws[key] for draws in drawn])
    for key in drawn[0]
    if all(key in draws for draws in drawn)
  }


def without_after_evaluations(
  entries: Sequence[RunResults],
) -> list[RunResults]:
  """Leaves out what after.json says where any run has held-out rows.

  The two are not of the same examples.
  """
  if not any(entry.has_held_out for entry in entries):
    return list(entries)
  return [dataclasses.replace(e, loss=None, means={}) for e in entries]


def results_by_column(
  entry: RunResults,
) -> Iterable[tuple[ColumnKey, list[Result]]]:
  """Rows that make a figure or a grid together; held-out ones first.

  The dataset of a key is AVERAGE for the paper's tasks, of which each has a
  column; else it is the key of the one column that the rows have.
  """
  parts = {}
  for row in entry.rows:
    key = ColumnKey(row.data, row.metric, _dataset(entry, row))
    parts.setdefault(key, []).append(row)
  return sorted(parts.items(), key=lambda item: column_order(item[0]))


def _dataset(entry: RunResults, row: Result) -> str:
  if row.metric == LOSS:
    return ''
  if row.task in (*EIGHT, *ROUNDS):
    return AVERAGE
  if row.data != HELD_OUT:
    return MEAN
  if entry.generates_tasks and row.task in tasks.TASKS:
    # Their prompts are the wordings, seen in training or held out.
    return f'{tasks.TASKS[row.task].group} {row.prompt}'.strip()
  return ''


def column_order(key: ColumnKey) -> tuple:
  """Sorts columns: held-out data, then by data, metric and dataset."""
  datasets = ('', *EIGHT, *ROUNDS, AVERAGE, MEAN)
  place = datasets.index(key.dataset) if key.dataset in datasets else 0
  metrics = (LOSS, *(name for name in metric_names() if name != LOSS))
  first = (HELD_OUT, AFTER)
  data = first.index(key.data) if key.data in first else len(first)
  metric = metrics.index(key.metric)
  return data, key.data, metric, place, key.dataset


def _named(key: ColumnKey, name: str) -> ColumnKey | None:
  """The column of a grid's score; None for one that has no column."""
  if key.dataset == AVERAGE:
    return key._replace(dataset=name)
  return key if name == AVERAGE else None


def _scaled(score: paper_metric.Score, scale: float) -> Estimate:
  fields = (score.value, score.low, score.high, score.majority)
  scaled = (None if x is None else scale * x for x in fields)
  return Estimate(
    *scaled, interval_method='' if score.low is None else EXAMPLES
  )


def _pooled_figure(rows: Sequence[Result]) -> Estimate:
  """Nats a target token over all examples of all tasks."""
  total = sum(sum(row.each) for row in rows)
  value = total / sum(sum(row.weights) for row in rows)
  if _single(rows):
    return Estimate(value)
  return Estimate(
    value, *bootstrap.interval(_pooled(rows)), interval_method=EXAMPLES
  )


def _single(rows: Sequence[Result]) -> bool:
  return len({(row.task, i) for row in rows for i in row.idx}) < 2


def _pooled(rows: Sequence[Result]) -> np.ndarray:
  """Draws of the same; an example is drawn with all of its prompts."""
  pairs = sorted({(row.task, i) for row in rows for i in row.idx})
  place = {pair: i for i, pair in enumerate(pairs)}
  idx, each, weights = [], [], []
  for row in rows:
    idx += [place[row.task, i] for i in row.idx]
    each += row.each
    weights += row.weights
  table = bootstrap.table([idx], [each], [weights])
  return bootstrap.means(*table, 'loss')[:, 0]
