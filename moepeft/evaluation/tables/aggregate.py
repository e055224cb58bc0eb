# SPDX-License-Identifier: Apache-2.0
"""Estimates of runs, of means over seeds and of differences, from results."""

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

# `ColumnKey.data` of the accuracies of task groups in after.json.
AFTER = 'after'
# `ColumnKey.dataset` of a mean over tasks that are not the paper's.
MEAN = 'mean'
# With fewer seeds a Student interval is much wider than the range of the
# seeds (9 times with two seeds), so none is reported.
_MIN_STUDENT_SEEDS = 5
# Values of `Estimate.interval_method`.
EXAMPLES = 'the percentile bootstrap over examples'
SEEDS_AND_EXAMPLES = (
  'the percentile bootstrap over seeds and examples, each resampled by itself '
  '(Owen, 2007)'
)
STUDENT = "Student's t over seeds (not over examples)"


class ColumnKey(NamedTuple):
  """The key of a column; dataset '' stands for all datasets of `data`."""

  data: str
  metric: str
  dataset: str


@dataclasses.dataclass(frozen=True)
class Estimate:
  """An estimate with its 95 % confidence interval; fractions are in per cent.

  Attributes:
    value: the point estimate.
    low, high: ends of the interval, or None.
    majority: the value of always predicting the most frequent label, or None.
    seeds: the value of each seed, for a mean over several seeds.
    interval_method: EXAMPLES, SEEDS_AND_EXAMPLES or STUDENT; '' without an
      interval.
  """

  value: float
  low: float | None = None
  high: float | None = None
  majority: float | None = None
  seeds: tuple[float, ...] = ()
  interval_method: str = dataclasses.field(default='', compare=False)


def estimates_of(entry: RunResults) -> dict[ColumnKey, Estimate]:
  """All estimates of one run, or of a base."""
  estimates = {}
  for key, rows in results_by_column(entry):
    if key.metric == LOSS:
      estimates[key] = _pooled_loss(rows)
      continue
    scale = metric_info(key.metric).factor
    for name, score in paper_metric.scores(rows, key.metric).items():
      if (column := _column_key(key, name)) is not None:
        estimates[column] = _scale(score, scale)
  loss = ColumnKey(HELD_OUT, LOSS, '')
  if loss not in estimates and entry.loss is not None:
    estimates[loss] = Estimate(entry.loss)
  for name, value in entry.means.items():
    estimates[ColumnKey(AFTER, ACCURACY, name)] = Estimate(100 * value)
  return estimates


def draws_of(entry: RunResults) -> dict[ColumnKey, np.ndarray]:
  """Bootstrap draws [draws] of the estimates, scaled as they are."""
  draws = {}
  for key, rows in results_by_column(entry):
    if key.metric == LOSS:
      if not _has_one_example(rows):
        draws[key] = _pooled_loss_draws(rows)
      continue
    scale = metric_info(key.metric).factor
    for name, score_draws in paper_metric.draws(rows, key.metric).items():
      if (column := _column_key(key, name)) is not None:
        draws[column] = scale * score_draws
  return draws


def mean_over_seeds(
  runs: Sequence[Mapping[ColumnKey, Estimate]],
  draws: Mapping[ColumnKey, np.ndarray] = types.MappingProxyType({}),
) -> dict[ColumnKey, Estimate]:
  """Means over runs that differ by seed, of the columns that all runs have.

  The estimates of a single run are returned as they are. The interval of
  several runs is that of `draws`. A column without draws (its scores are not
  known by example) has Student's interval over five or more runs, clipped to
  the metric's bounds, and none over fewer.

  Args:
    draws: `mean_draws` of the same runs.
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
        low, high = bootstrap.interval(draws[key])
        interval_method = SEEDS_AND_EXAMPLES
      elif len(values) >= _MIN_STUDENT_SEEDS:
        half_width, interval_method = student_half_width(values), STUDENT
        lower, upper = metric_info(key.metric).bounds
        low, high = max(mean - half_width, lower), min(mean + half_width, upper)
      majorities = [run[key].majority for run in runs]
      # The seed may select the examples, and so the most frequent label.
      majority = None if None in majorities else float(np.mean(majorities))
      seeds = tuple(values.tolist())
      means[key] = Estimate(mean, low, high, majority, seeds, interval_method)
  return means


def student_half_width(values: np.ndarray) -> float:
  """Half the width of a mean's 95 % interval: t sd / sqrt(n), n - 1 degrees."""
  n = len(values)
  deviation = np.std(values, ddof=1)
  return float(special.stdtrit(n - 1, 0.975) * deviation / np.sqrt(n))


def differences(
  method: tuple[Mapping[ColumnKey, Estimate], Mapping[ColumnKey, np.ndarray]],
  baseline: tuple[Mapping[ColumnKey, Estimate], Mapping[ColumnKey, np.ndarray]],
) -> dict[ColumnKey, Estimate]:
  """A method's estimates minus the baseline's, with paired intervals.

  Args:
    method, baseline: (estimates of `mean_over_seeds`, draws of `mean_draws`).
  """
  (estimates, draws), (base_estimates, base_draws) = method, baseline
  result = {}
  for key in estimates.keys() & base_estimates.keys():
    low = high = None
    if key in draws and key in base_draws:
      low, high = bootstrap.interval(draws[key] - base_draws[key])
    difference = estimates[key].value - base_estimates[key].value
    result[key] = Estimate(difference, low, high)
  return result


def mean_draws(entries: Sequence[RunResults]) -> dict[ColumnKey, np.ndarray]:
  """Draws of the mean over seeds, of the columns with draws in all runs.

  Each draw resamples the seeds, and the examples alike for all seeds.
  """
  by_seed = [draws_of(e) for e in sorted(entries, key=lambda e: e.seed)]
  weights = bootstrap.seed_weights(len(by_seed))
  return {
    key: np.einsum('is,si->i', weights, [draws[key] for draws in by_seed])
    for key in by_seed[0]
    if all(key in draws for draws in by_seed)
  }


def without_after_evaluations(
  entries: Sequence[RunResults],
) -> list[RunResults]:
  """Drops after.json's values if any run has results of held-out rows.

  The two are of different examples.
  """
  if not any(entry.has_held_out for entry in entries):
    return list(entries)
  return [dataclasses.replace(e, loss=None, means={}) for e in entries]


def results_by_column(
  entry: RunResults,
) -> Iterable[tuple[ColumnKey, list[Result]]]:
  """Groups the results of a run by column, held-out data first.

  The paper's tasks, which have a column each, are one group, whose dataset is
  AVERAGE.
  """
  groups = {}
  for row in entry.rows:
    key = ColumnKey(row.data, row.metric, _dataset(entry, row))
    groups.setdefault(key, []).append(row)
  return sorted(groups.items(), key=lambda item: column_order(item[0]))


def _dataset(entry: RunResults, row: Result) -> str:
  if row.metric == LOSS:
    return ''
  if row.task in (*EIGHT, *ROUNDS):
    return AVERAGE
  if row.data != HELD_OUT:
    return MEAN
  if entry.generates_tasks and row.task in tasks.TASKS:
    # Prompts of embedded tasks are 'seen' and 'held_out' templates.
    return f'{tasks.TASKS[row.task].group} {row.prompt}'.strip()
  return ''


def column_order(key: ColumnKey) -> tuple:
  """The sort key of columns: held-out data first, then metric and dataset."""
  all_data = (HELD_OUT, AFTER)
  data = all_data.index(key.data) if key.data in all_data else len(all_data)
  metrics = (LOSS, *(name for name in metric_names() if name != LOSS))
  metric = metrics.index(key.metric)
  datasets = ('', *EIGHT, *ROUNDS, AVERAGE, MEAN)
  dataset = datasets.index(key.dataset) if key.dataset in datasets else 0
  return data, key.data, metric, dataset, key.dataset


def _column_key(key: ColumnKey, name: str) -> ColumnKey | None:
  """The column of a score of `paper_metric`; None if it has none."""
  if key.dataset == AVERAGE:
    return key._replace(dataset=name)
  return key if name == AVERAGE else None


def _scale(score: paper_metric.Score, scale: float) -> Estimate:
  fields = (score.value, score.low, score.high, score.majority)
  values = (None if x is None else scale * x for x in fields)
  return Estimate(
    *values, interval_method='' if score.low is None else EXAMPLES
  )


def _pooled_loss(rows: Sequence[Result]) -> Estimate:
  """Nats per target token over all examples of all tasks."""
  total = sum(sum(row.each) for row in rows)
  value = total / sum(sum(row.weights) for row in rows)
  if _has_one_example(rows):
    return Estimate(value)
  low, high = bootstrap.interval(_pooled_loss_draws(rows))
  return Estimate(value, low, high, interval_method=EXAMPLES)


def _has_one_example(rows: Sequence[Result]) -> bool:
  return len({(row.task, i) for row in rows for i in row.idx}) < 2


def _pooled_loss_draws(rows: Sequence[Result]) -> np.ndarray:
  """Draws of the pooled loss; an example is drawn with all of its prompts."""
  pairs = sorted({(row.task, i) for row in rows for i in row.idx})
  index = {pair: i for i, pair in enumerate(pairs)}
  idx, each, weights = [], [], []
  for row in rows:
    idx += [index[row.task, i] for i in row.idx]
    each += row.each
    weights += row.weights
  table = bootstrap.table([idx], [each], [weights])
  return bootstrap.means(*table, 'loss')[:, 0]
