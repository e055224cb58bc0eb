# SPDX-License-Identifier: Apache-2.0
"""Runs as the lines of a table: beside each other, a baseline, the paper."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moepeft.checkpoints.count_parameters import count
from moepeft.config import defaults as config_lib
from moepeft.evaluation import bootstrap, published
from moepeft.evaluation.paper_metric import AVERAGE, EIGHT, ROUNDS
from moepeft.evaluation.published import Published
from moepeft.evaluation.results import ACCURACY, HELD_OUT, LOSS, metric_info
from moepeft.evaluation.tables import aggregate as figures
from moepeft.evaluation.tables import comparable, footnotes, run_results, seeds
from moepeft.evaluation.tables import routing as routing_tables
from moepeft.evaluation.tables.aggregate import AFTER, MEAN, Figure, Key
from moepeft.evaluation.tables.render import (
  PARAMETERS,
  PERCENT,
  SEEDS,
  Cell,
  Column,
  Line,
  Table,
)
from moepeft.evaluation.tables.run_results import Entry
from moepeft.evaluation.tables.seeds import Group
from moepeft.peft.build import plain
from moepeft.runs.run import Run


def columns(keys: Sequence[Key]) -> list[Column]:
  """A column for each key, with a name of its own."""
  several = len({k.data for k in keys if k.dataset in EIGHT}) > 1
  return [_column(key, _name(key, several)) for key in keys]


def _column(key: Key, name: str) -> Column:
  info = metric_info(key.metric)
  return Column(
    key,
    name,
    'score',
    better='higher' if info.larger_is_better else 'lower',
    unit=info.unit,
    bounds=info.bounds,
    decimals=3 if key.metric == LOSS else None,
  )


def _name(key: Key, several: bool) -> str:
  metric = key.metric.replace('_', ' ')
  if key.data == HELD_OUT and not key.dataset:
    return f'held-out {metric}'
  if _is_group(key):
    name = key.dataset.replace('_', '-')
    return name if metric == ACCURACY else f'{name} {metric}'
  if key.dataset in ('', MEAN):
    return f'{key.data} {metric}'
  name = key.dataset if metric == ACCURACY else f'{key.dataset} {metric}'
  return f'{name} ({key.data})' if several else name


def _is_group(key: Key) -> bool:
  """Whether a column is of a group of tasks, named by the group."""
  papers = (*EIGHT, *ROUNDS, AVERAGE)
  return key.data == AFTER or (
    key.data == HELD_OUT and key.dataset not in papers
  )


# The data of columns of the paper's table alone.
_PRINTED = 'paper'


def table(
  runs: Sequence[str],
  paper: str = '',
  baseline: str = '',
  title: str = '',
  routing: bool = False,
) -> Table:
  """The table of some work directories, in the order they are given.

  Args:
    runs: work directories; with none of them, the paper's table alone.
    paper: one of the paper's tables, or ''.
    baseline: a method, or one of the runs, that the others are compared with.
    title: of the table.
    routing: whether to say how the routers of the runs ended up.

  Raises:
    ValueError: nothing is asked for, there is no such table or baseline, or
      runs are damaged or not to be compared.
  """
  printed = published.table(paper) if paper else ()
  if not runs:
    if not printed:
      raise ValueError(
        'name the work directories of runs, or a table with --paper=t5_xl'
      )
    return _paper_alone(paper, printed, title)
  given = _read(runs)
  entries = figures.of_one_kind(given)
  comparable.check(entries)
  grouped = seeds.group(entries)
  single = [[figures.of_entry(e) for e in row.entries] for row in grouped]
  drawn = [figures.mean_draws(row.entries) for row in grouped]
  rows = [
    _Row(
      group,
      figures.over_seeds(own, draws),
      draws,
      _match(printed, group.first),
      routing_tables.cells(group.entries) if routing else {},
    )
    for group, own, draws in zip(grouped, single, drawn, strict=True)
  ]
  found = [row.figures for row in rows]
  keys = sorted({key for own in found for key in own}, key=figures.order)
  about_routers = (
    routing_tables.columns(row.routing for row in rows) if routing else []
  )
  shown = [*columns(keys), *about_routers]
  against = _against(rows, baseline) if baseline else None
  majority = _majority(found, keys)
  placed = _lines(rows, bool(printed), against)
  lines = [*majority, *(line for line, _ in placed)]
  of_rows = {
    i: row
    for i, (_, row) in enumerate(placed, len(majority))
    if row is not None
  }
  notes = [
    *footnotes.of_runs(grouped, found, keys),
    *footnotes.of_best(grouped),
    *footnotes.of_missing(grouped, single, shown),
    *footnotes.of_after(given, entries),
  ]
  if against is not None and any(
    cell.low is not None
    for row in rows
    if row is not against
    for cell in _less(row, against).cells.values()
  ):
    notes.append(footnotes.of_baseline(against.group))
  if routing:
    notes += routing_tables.notes(about_routers)
  if printed:
    matched = [row.printed for row in rows if row.printed]
    notes += footnotes.of_paper(paper, matched)
  return Table(
    (PARAMETERS, PERCENT, SEEDS, *shown),
    tuple(lines),
    tuple(notes),
    title,
    decimals=2 if printed else 1,
    best=_best(of_rows, columns(keys)),
  )


@dataclasses.dataclass(frozen=True)
class _Row:
  """A group with its figures, their draws, the paper's row, its routing."""

  group: Group
  figures: Mapping[Key, Figure]
  draws: Mapping[Key, np.ndarray]
  printed: Published | None
  routing: Mapping[str, Cell]


def _read(runs: Sequence[str]) -> list[Entry]:
  defaults = json.loads(config_lib.default().to_json())
  # A shell's glob and completion end a folder with a slash.
  paths = [run.rstrip('/') or run for run in runs]
  return [entry for path in paths for entry in run_results.read(path, defaults)]


def _lines(
  rows: Sequence[_Row], paper: bool, against: _Row | None
) -> list[tuple[Line, _Row | None]]:
  """A row's line with the row, then its differences; bases first."""
  lines = []
  for row in sorted(rows, key=lambda row: not row.group.first.is_base):
    lines.append((_line(row, paper), row))
    if against is not None and row is not against:
      lines.append((_less(row, against), None))
    if row.printed is not None:
      lines += [(line, None) for line in _beside(row.printed, row.figures)]
  return lines


def _best(
  rows: Mapping[int, _Row], columns: Sequence[Column]
) -> frozenset[tuple[int, Key]]:
  """(line, key) of figures that are clearly the best of their column.

  The 95 % interval of the difference from each other row, over the same
  resamples, has no 0; a figure without draws is not told from the others.
  """
  best = set()
  for column in columns:
    key = column.key
    sign = 1 if column.better == 'higher' else -1
    there = {i: row for i, row in rows.items() if key in row.figures}
    if len(there) < 2:
      continue
    top = max(there, key=lambda i: sign * there[i].figures[key].value)
    others = [row for i, row in there.items() if i != top]
    if all(key in row.draws for row in there.values()) and all(
      bootstrap.interval(sign * (there[top].draws[key] - row.draws[key]))[0] > 0
      for row in others
    ):
      best.add((top, key))
  return frozenset(best)


def _match(printed: Sequence[Published], entry: Entry) -> Published | None:
  """The paper's row of a run's method."""
  if entry.is_base or not printed:
    return None
  own = plain(entry.method, entry.semantics)
  for row in printed:
    if row.method and plain(row.method, entry.semantics) == own:
      return row
  return None


def _against(rows: Sequence[_Row], baseline: str) -> _Row:
  """The row that --baseline names, by a work directory or by its method."""
  wanted = os.path.abspath(os.path.expanduser(baseline))
  found = [
    row
    for row in rows
    if wanted in {os.path.abspath(e.folder) for e in row.group.entries}
    and not row.group.first.is_base
  ] or [row for row in rows if _same_method(row.group.first, baseline)]
  if len(found) != 1:
    there = ', '.join(dict.fromkeys(row.group.first.method for row in rows))
    raise ValueError(
      f'--baseline={baseline} names {len(found)} rows, expected one; the '
      f'methods are {there}: give one of them, or its work directory'
    )
  return found[0]


def _same_method(entry: Entry, text: str) -> bool:
  if entry.is_base or text == run_results.BASE:
    return entry.method == text
  try:
    return plain(entry.method, entry.semantics) == plain(text, entry.semantics)
  except ValueError:
    # Neither a method nor a run: the caller lists what there is.
    return False


def _line(row: _Row, paper: bool) -> Line:
  first, aside = row.group.first, row.group.aside
  if paper and row.printed is None and not first.is_base:
    aside = f'{aside} (not in the paper)'
  cells: dict[Any, Cell] = {
    k: _cell(figure) for k, figure in row.figures.items()
  }
  cells |= row.routing
  if not first.is_base:
    trained, base = _counts(first)
    cells[PARAMETERS.key] = Cell(trained)
    cells[PERCENT.key] = Cell(100 * trained / base)
    cells[SEEDS.key] = Cell(len(row.group.entries))
  kind = 'base' if first.is_base else 'run'
  return Line(kind, first.method, aside.strip(), cells=cells)


def _counts(entry: Entry) -> tuple[int, int]:
  """(trained, of the base), from the rows or else from shapes."""
  if entry.parameters is not None:
    return entry.parameters, entry.base_parameters
  counted = count(Run(entry.folder).load_config())
  return counted['peft'], counted['params']


def _cell(figure: Figure) -> Cell:
  return Cell(figure.value, figure.low, figure.high, figure.seeds)


def _majority(found: Sequence[Mapping[Key, Figure]], keys) -> list[Line]:
  cells = {}
  for key in keys:
    values = [own[key].majority for own in found if key in own]
    known = [value for value in values if value is not None]
    if known:
      cells[key] = Cell(float(np.mean(known)))
  return [Line('majority', '', 'majority', cells=cells)] if cells else []


def _paired(row: _Row, other: _Row) -> bool:
  """Whether held-out examples of both are the same: by seed, if embedded."""
  entries = (*row.group.entries, *other.group.entries)
  if all(entry.source != 'tasks' for entry in entries):
    return True
  ours, theirs = ({e.seed for e in r.group.entries} for r in (row, other))
  return ours == theirs


def _less(row: _Row, other: _Row) -> Line:
  ours = row.draws
  if not _paired(row, other):
    # What is drawn anew for every seed is not the same examples.
    ours = {key: own for key, own in ours.items() if key.data != HELD_OUT}
  theirs = (other.figures, other.draws)
  found = figures.differences((row.figures, ours), theirs)
  cells = {key: _cell(figure) for key, figure in found.items()}
  words = ('less', other.group.first.method, other.group.aside)
  return Line('difference', '', ' '.join(filter(None, words)), cells=cells)


def _beside(printed: Published, own: Mapping[Key, Figure]) -> list[Line]:
  """The paper's line, and ours less the paper's."""
  there = printed.cells()
  paper: dict[Any, Cell] = {
    key: Cell(there[key.dataset])
    for key in own
    if _is_papers(key) and key.dataset in there
  }
  less = {}
  for key in paper:
    ours, value = own[key], there[key.dataset]
    bounds = (ours.low, ours.high)
    low, high = (None if x is None else x - value for x in bounds)
    less[key] = Cell(ours.value - value, low, high)
  if printed.percent is not None:
    paper[PERCENT.key] = Cell(printed.percent)
  name = 'paper' if printed.name == printed.method else f'paper: {printed.name}'
  return [
    Line('paper', '', name, cells=paper),
    Line('difference', '', 'less the paper', cells=less),
  ]


def _is_papers(key: Key) -> bool:
  return key.metric == ACCURACY and key.dataset in (*EIGHT, AVERAGE)


def _paper_alone(size: str, printed: Sequence[Published], title: str) -> Table:
  keys = [Key(_PRINTED, ACCURACY, name) for name in (*EIGHT, AVERAGE)]
  lines, notes = [], footnotes.of_paper(size, ())
  for row in printed:
    remark = footnotes.of_row(row)
    mark = ''
    if remark:
      mark = str(1 + sum(note.startswith('[') for note in notes))
      notes.append(f'[{mark}] {remark}')
    there = row.cells()
    cells: dict[Any, Cell] = {
      key: Cell(there[key.dataset]) for key in keys if key.dataset in there
    }
    if row.percent is not None:
      cells[PERCENT.key] = Cell(row.percent)
    own = row.name == row.method
    lines.append(
      Line('run', row.name if own else '', '' if own else row.name, mark, cells)
    )
  shown = (PERCENT, *columns(keys))
  return Table(shown, tuple(lines), tuple(notes), title)
