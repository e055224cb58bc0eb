# SPDX-License-Identifier: Apache-2.0
"""Rows of one run as text, for a terminal."""

from collections.abc import Sequence

import numpy as np

from moepeft.evaluation import paper_measure
from moepeft.evaluation.results import MEASURES, Row

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
# (unit, factor, digits) of a measure; of the others, per cent.
_UNITS = {'loss': ('nats a token', 1, 4), 'bleu': ('0 to 100', 1, 1)}
_PERCENT = ('%', 100, 1)
# Prompts of the embedded tasks: wordings of training, and others.
_WORDINGS = ('seen', 'held_out')


def table(rows: Sequence[Row]) -> str:
  """The scores of each measure, with their intervals, and what they are of.

  'over prompts' is from the least to the greatest figure of a task's prompts.

  Raises:
    ValueError: a prompt occurs twice.
  """
  blocks = []
  for name in MEASURES:
    unit = _UNITS.get(name, _PERCENT)[0]
    found = _by_wordings([row for row in rows if row.measure == name])
    for which, own in found.items():
      lines = columns(_lines(name, own))
      blocks.append(f'{name} ({unit}){which}\n{lines}')
  return '\n\n'.join(blocks)


def _by_wordings(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Rows of the embedded tasks by wording: a median over both is of neither."""
  names = {row.prompt for row in rows}
  if names != set(_WORDINGS):
    return {'': list(rows)} if rows else {}
  return {
    f', wordings {name}': [row for row in rows if row.prompt == name]
    for name in _WORDINGS
  }


def _lines(name: str, rows: Sequence[Row]) -> list[Sequence[str]]:
  lines = [_HEAD]
  for task, score in paper_measure.scores(rows, name).items():
    own = rows
    if task != paper_measure.AVERAGE:
      members = paper_measure.ROUNDS if task == 'anli' else (task,)
      own = [row for row in rows if row.task in members]
    lines.append(_line(name, task, score, own))
  unused = {'perplexity'} if name != 'loss' else set()
  # The first is of several prompts only, the second of accuracy.
  for key in ('over prompts', 'majority'):
    place = _HEAD.index(key)
    if all(line[place] == '-' for line in lines[1:]):
      unused.add(key)
  keep = [i for i, key in enumerate(_HEAD) if key not in unused]
  return [[line[i] for i in keep] for line in lines]


def _line(
  name: str, task: str, score: paper_measure.Score, rows: Sequence[Row]
) -> Sequence[str]:
  """Cells of all of `_HEAD`."""
  _, factor, digits = _UNITS.get(name, _PERCENT)

  def shown(value: float | None) -> str:
    return '-' if value is None else f'{factor * value:.{digits}f}'

  def span(low: float | None, high: float | None) -> str:
    return '-' if low is None else f'{shown(low)} to {shown(high)}'

  values = [row.value for row in rows]
  single = task == paper_measure.AVERAGE or len(values) < 2
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


def _examples(rows: Sequence[Row]) -> int:
  """Different ones, whatever their prompts."""
  return len({(row.task, i) for row in rows for i in row.idx})


def columns(lines: Sequence[Sequence[str]]) -> str:
  """Lines of cells as text, each column as wide as its widest cell."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.ljust(w) for cell, w in zip(line, widths, strict=True)
    ).rstrip()
    for line in lines
  )
