# SPDX-License-Identifier: Apache-2.0
"""Describes how a run's evaluation changed from before to after training."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from moepeft.runs.metrics_log import is_number

# Half width of a 95 % confidence interval, in standard errors.
_Z_95 = 1.96
# The most groups of tasks that one line names.
_MAX_NAMES = 6


def describe_changes(
  before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[str]:
  """Lines on the metrics and accuracies that are in both evaluations.

  A difference of accuracies below 1.96 standard errors is reported as within
  noise. The standard error takes examples as independent.

  Args:
    before, after: the contents of before.json and after.json.
  """
  lines = []
  metrics = sorted(
    (key for key in after if key.startswith('validation_')),
    key=lambda key: (key != 'validation_loss', key),
  )
  for key in metrics:
    old, new = before.get(key), after.get(key)
    if is_number(old) and is_number(new):
      verb = 'rose' if new > old else 'fell'
      name, (first, last) = key.replace('_', ' '), format_pair(old, new)
      lines.append(
        f'{name} stayed at {last}'
        if first == last
        else f'{name} {verb} from {first} to {last}'
      )
  rose, fell, within_noise = [], [], []
  for text, difference, half_width in _mean_differences(before, after):
    if difference > half_width:
      rose.append(text)
    elif difference < -half_width:
      fell.append(text)
    else:
      within_noise.append(text)
  for name, texts in (
    ('accuracy rose', rose),
    ('accuracy fell', fell),
    ('accuracy within noise', within_noise),
  ):
    if texts:
      lines.append(f'{name}: {", ".join(texts[:_MAX_NAMES])}')
      lines[-1] += ', ...' if len(texts) > _MAX_NAMES else ''
  return lines + _largest_changes(before, after)


def format_pair(old: float, new: float) -> tuple[str, str]:
  """Formats two numbers; one below 1e-4 of the other is written as 0."""
  threshold = 1e-4 * max(abs(old), abs(new))
  return tuple('0' if abs(x) < threshold else f'{x:.4g}' for x in (old, new))


def _mean_differences(before, after) -> list[tuple[str, float, float]]:
  """(text, difference, half width of its 95 % interval) for each group mean."""
  old_means, new_means = before.get('means'), after.get('means')
  if not isinstance(old_means, dict) or not isinstance(new_means, dict):
    return []
  differences = []
  for name, new in new_means.items():
    old = old_means.get(name)
    if is_number(old) and is_number(new):
      variances = []
      for evaluation in (before, after):
        rows = [r for r in _rows(evaluation) if _group_name(r) == name]
        variances += [_variance(r) / len(rows) ** 2 for r in rows]
      text = f'{name} {100 * old:.1f} -> {100 * new:.1f} %'
      half_width = _Z_95 * math.sqrt(sum(variances))
      differences.append((text, new - old, half_width))
  return differences


def is_beyond_noise(
  old: Mapping[str, Any], new: Mapping[str, Any], tasks: int
) -> bool:
  """Whether a task's accuracies differ significantly.

  The level is 5 % for all tasks together (Bonferroni), because the largest of
  many differences is large by chance.

  Args:
    old, new: rows of before.json and after.json.
    tasks: the number of rows that are compared.
  """
  z = statistics.NormalDist().inv_cdf(1 - 0.025 / max(tasks, 1))
  noise = z * math.sqrt(_variance(old) + _variance(new))
  return abs(new['accuracy'] - old['accuracy']) > noise


def _largest_changes(before, after) -> list[str]:
  """A line on the tasks whose accuracies rose and fell the most."""
  old_rows = {_task_name(row): row for row in _rows(before)}
  pairs = [
    (old_rows[_task_name(row)], row)
    for row in _rows(after)
    if _task_name(row) in old_rows
  ]
  changes = [
    (100 * (new['accuracy'] - old['accuracy']), _task_name(new))
    for old, new in pairs
    if is_beyond_noise(old, new, len(old_rows))
  ]
  if len(old_rows) < 2 or not changes:
    return []
  largest = dict.fromkeys((max(changes), min(changes)))
  names = ', '.join(f'{name} {change:+.0f} points' for change, name in largest)
  return [f'tasks that moved the most: {names}']


def _rows(evaluation) -> list[dict]:
  rows = evaluation.get('rows')
  return [
    row
    for row in (rows if isinstance(rows, list) else [])
    if isinstance(row, dict) and is_number(row.get('accuracy'))
  ]


def _group_name(row: Mapping[str, Any]) -> str:
  return f'{row.get("group", "")} {row.get("templates", "")}'.strip()


def _task_name(row: Mapping[str, Any]) -> str:
  return f'{row.get("task", "")} {row.get("templates", "")}'.strip()


def _variance(row: Mapping[str, Any]) -> float:
  """The variance p (1 - p) / n of an accuracy p over n examples.

  Two successes and two failures are added (Agresti and Coull, 1998), so that an
  accuracy of 0 or 1 has a variance above zero.
  """
  count = row.get('examples')
  count = count if is_number(count) and count > 0 else 1
  p = (row['accuracy'] * count + 2) / (count + 4)
  return p * (1 - p) / (count + 4)
