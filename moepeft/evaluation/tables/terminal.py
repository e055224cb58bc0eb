# SPDX-License-Identifier: Apache-2.0
"""Renders the results of one run as text for a terminal."""

from collections.abc import Sequence

import numpy as np

from moepeft.evaluation import paper_metric
from moepeft.evaluation.results import (
  LOSS,
  Result,
  metric_info,
  metric_names,
)

_HEAD = (
  'task',
  'median',
  'perplexity',
  'over prompts',
  '95 % interval',
  'majority',
  'prompts',
  'examples',
)
# Prompts of embedded tasks: templates seen in training, and held-out ones.
_TEMPLATE_SPLITS = ('seen', 'held_out')


def table(rows: Sequence[Result]) -> str:
  """The scores of each metric, with intervals and numbers of examples.

  'over prompts' is the range of the values of a task's prompts.

  Raises:
    ValueError: a prompt occurs twice.
  """
  blocks = []
  for name in metric_names():
    unit = metric_info(name).unit
    by_split = _by_template_split([row for row in rows if row.metric == name])
    for suffix, split_rows in by_split.items():
      lines = aligned(_lines(name, split_rows))
      blocks.append(f'{name} ({unit}){suffix}\n{lines}')
  return '\n\n'.join(blocks)


def _by_template_split(rows: Sequence[Result]) -> dict[str, list[Result]]:
  """Results of embedded tasks by template split, which share no median."""
  names = {row.prompt for row in rows}
  if names != set(_TEMPLATE_SPLITS):
    return {'': list(rows)} if rows else {}
  return {
    f', wordings {name}': [row for row in rows if row.prompt == name]
    for name in _TEMPLATE_SPLITS
  }


def _lines(name: str, rows: Sequence[Result]) -> list[Sequence[str]]:
  lines = [_HEAD]
  for task, score in paper_metric.scores(rows, name).items():
    task_rows = rows
    if task != paper_metric.AVERAGE:
      members = paper_metric.ROUNDS if task == 'anli' else (task,)
      task_rows = [row for row in rows if row.task in members]
    lines.append(_line(name, task, score, task_rows))
  unused = {'perplexity'} if name != LOSS else set()
  # Only several prompts have a range, and only accuracy has a majority.
  for key in ('over prompts', 'majority'):
    column = _HEAD.index(key)
    if all(line[column] == '-' for line in lines[1:]):
      unused.add(key)
  columns = [i for i, key in enumerate(_HEAD) if key not in unused]
  return [[line[i] for i in columns] for line in lines]


def _line(
  name: str, task: str, score: paper_metric.Score, rows: Sequence[Result]
) -> Sequence[str]:
  """The cells of all columns of `_HEAD`."""
  info = metric_info(name)

  def number(value: float | None) -> str:
    return '-' if value is None else f'{info.factor * value:.{info.decimals}f}'

  def interval(low: float | None, high: float | None) -> str:
    return '-' if low is None else f'{number(low)} to {number(high)}'

  values = [row.value for row in rows]
  single = task == paper_metric.AVERAGE or len(values) < 2
  return (
    task,
    number(score.value),
    f'{np.exp(score.value):.3f}',
    '-' if single else interval(min(values), max(values)),
    interval(score.low, score.high),
    number(score.majority),
    str(len(rows)),
    str(len({(row.task, i) for row in rows for i in row.idx})),
  )


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Joins lines of cells, with columns as wide as their widest cell."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.ljust(w) for cell, w in zip(line, widths, strict=True)
    ).rstrip()
    for line in lines
  )
