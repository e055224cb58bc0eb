# SPDX-License-Identifier: Apache-2.0
"""Rows of one run as text, for a terminal."""

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
# Prompts of the embedded tasks: wordings of training, and others.
_WORDINGS = ('seen', 'held_out')


def table(rows: Sequence[Result]) -> str:
  """The scores of each metric, with their intervals, and what they are of.

  'over prompts' is from the least to the greatest figure of a task's prompts.

  Raises:
    ValueError: a prompt occurs twice.
  """
  blocks = []
  for name in metric_names():
    unit = metric_info(name).unit
    by_split = _by_wordings([row for row in rows if row.metric == name])
    for suffix, split_rows in by_split.items():
      lines = aligned(_lines(name, split_rows))
      blocks.append(f'{name} ({unit}){suffix}\n{lines}')
  return '\n\n'.join(blocks)


def _by_wordings(rows: Sequence[Result]) -> dict[str, list[Result]]:
  """Rows of the embedded tasks by wording: a median over both is of neither."""
  names = {row.prompt for row in rows}
  if names != set(_WORDINGS):
    return {'': list(rows)} if rows else {}
  return {
    f', wordings {name}': [row for row in rows if row.prompt == name]
    for name in _WORDINGS
  }


def _lines(name: str, rows: Sequence[Result]) -> list[Sequence[str]]:
  lines = [_HEAD]
  for task, score in paper_metric.scores(rows, name).items():
    of_task = rows
    if task != paper_metric.AVERAGE:
      members = paper_metric.ROUNDS if task == 'anli' else (task,)
      of_task = [row for row in rows if row.task in members]
    lines.append(_line(name, task, score, of_task))
  unused = {'perplexity'} if name != LOSS else set()
  # The first is of several prompts only, the second of accuracy.
  for key in ('over prompts', 'majority'):
    place = _HEAD.index(key)
    if all(line[place] == '-' for line in lines[1:]):
      unused.add(key)
  keep = [i for i, key in enumerate(_HEAD) if key not in unused]
  return [[line[i] for i in keep] for line in lines]


def _line(
  name: str, task: str, score: paper_metric.Score, rows: Sequence[Result]
) -> Sequence[str]:
  """Cells of all of `_HEAD`."""
  info = metric_info(name)

  def shown(value: float | None) -> str:
    return '-' if value is None else f'{info.factor * value:.{info.decimals}f}'

  def span(low: float | None, high: float | None) -> str:
    return '-' if low is None else f'{shown(low)} to {shown(high)}'

  values = [row.value for row in rows]
  single = task == paper_metric.AVERAGE or len(values) < 2
  return (
    task,
    shown(score.value),
    f'{np.exp(score.value):.3f}',
    '-' if single else span(min(values), max(values)),
    span(score.low, score.high),
    shown(score.majority),
    str(len(rows)),
    str(_examples(rows)),
  )


def _examples(rows: Sequence[Result]) -> int:
  """Different ones, whatever their prompts."""
  return len({(row.task, i) for row in rows for i in row.idx})


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Lines of cells as text, each column as wide as its widest cell."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.ljust(w) for cell, w in zip(line, widths, strict=True)
    ).rstrip()
    for line in lines
  )
