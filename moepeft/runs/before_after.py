# SPDX-License-Identifier: Apache-2.0
"""Differences of a run's evaluations before and after training, in words."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from moepeft.runs.metrics_log import is_number

# Standard errors of a difference beyond which it is no noise of the examples.
_ERRORS = 1.96
# Groups or tasks that a line names.
_NAMED = 6


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
  """Lines on what rose and what fell; none without a `before`.

  A difference of accuracies within 1.96 standard errors of as many independent
  examples is called noise.

  Args:
    before, after: as in before.json and after.json.
  """
  lines = []
  figures = sorted(
    (key for key in after if key.startswith('validation_')),
    key=lambda key: (key != 'validation_loss', key),
  )
  for key in figures:
    old, new = before.get(key), after.get(key)
    if is_number(old) and is_number(new):
      verb = 'rose' if new > old else 'fell'
      name, (first, last) = key.replace('_', ' '), format_pair(old, new)
      lines.append(
        f'{name} stayed at {last}'
        if first == last
        else f'{name} {verb} from {first} to {last}'
      )
  groups = _groups(before, after)
  for name, chosen in (
    ('accuracy rose', [g for g in groups if g[1] > g[2]]),
    ('accuracy fell', [g for g in groups if g[1] < -g[2]]),
    ('accuracy within noise', [g for g in groups if abs(g[1]) <= g[2]]),
  ):
    if chosen:
      lines.append(f'{name}: {", ".join(g[0] for g in chosen[:_NAMED])}')
      lines[-1] += ', ...' if len(chosen) > _NAMED else ''
  return lines + _extremes(before, after)


def format_pair(old: float, new: float) -> tuple[str, str]:
  """Two numbers to be compared; what is nothing beside the other is 0."""
  threshold = 1e-4 * max(abs(old), abs(new))
  return tuple('0' if abs(x) < threshold else f'{x:.4g}' for x in (old, new))


def _groups(before, after) -> list[tuple[str, float, float]]:
  """(text, difference, its 95 % half width) of each mean over tasks."""
  olds, news = before.get('means'), after.get('means')
  if not isinstance(olds, dict) or not isinstance(news, dict):
    return []
  groups = []
  for name, new in news.items():
    old = olds.get(name)
    if is_number(old) and is_number(new):
      variances = []
      for evaluation in (before, after):
        rows = [r for r in _tasks(evaluation) if _group(r) == name]
        variances += [_variance(r) / len(rows) ** 2 for r in rows]
      text = f'{name} {100 * old:.1f} -> {100 * new:.1f} %'
      half = _ERRORS * math.sqrt(sum(variances))
      groups.append((text, new - old, half))
  return groups


def is_beyond_noise(
  old: Mapping[str, Any], new: Mapping[str, Any], tasks: int
) -> bool:
  """Whether a task's accuracies differ by more than the noise of its examples.

  The largest of many differences is large by chance alone, so the 5 % are those
  of all tasks together (Bonferroni).

  Args:
    old, new: rows of before.json and after.json.
    tasks: rows that are compared.
  """
  errors = statistics.NormalDist().inv_cdf(1 - 0.025 / max(tasks, 1))
  noise = errors * math.sqrt(_variance(old) + _variance(new))
  return abs(new['accuracy'] - old['accuracy']) > noise


def _extremes(before, after) -> list[str]:
  """The tasks that rose and fell the most, beyond their noise."""
  olds = {_task(row): row for row in _tasks(before)}
  pairs = [(olds[_task(r)], r) for r in _tasks(after) if _task(r) in olds]
  moved = [
    (100 * (new['accuracy'] - old['accuracy']), _task(new))
    for old, new in pairs
    if is_beyond_noise(old, new, len(olds))
  ]
  if len(olds) < 2 or not moved:
    return []
  ends = dict.fromkeys((max(moved), min(moved)))
  names = ', '.join(f'{name} {change:+.0f} points' for change, name in ends)
  return [f'tasks that moved the most: {names}']


def _tasks(evaluation) -> list[dict]:
  rows = evaluation.get('rows')
  return [
    row
    for row in (rows if isinstance(rows, list) else [])
    if isinstance(row, dict) and is_number(row.get('accuracy'))
  ]


def _group(row: Mapping[str, Any]) -> str:
  return f'{row.get("group", "")} {row.get("templates", "")}'.strip()


def _task(row: Mapping[str, Any]) -> str:
  return f'{row.get("task", "")} {row.get("templates", "")}'.strip()


def _variance(row: Mapping[str, Any]) -> float:
  """The variance of an accuracy of n examples: p (1 - p) / n, with p drawn to
  the middle (Agresti and Coull, 1998), so that 0 and 1 are not certain."""
  count = row.get('examples')
  count = count if is_number(count) and count > 0 else 1
  p = (row['accuracy'] * count + 2) / (count + 4)
  return p * (1 - p) / (count + 4)
