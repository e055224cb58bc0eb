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
from moepeft.evaluation.tables import (
  aggregate,
  comparable,
  footnotes,
  run_results,
  seeds,
)
from moepeft.evaluation.tables import routing as routing_tables
from moepeft.evaluation.tables.aggregate import AFTER, MEAN, ColumnKey, Estimate
from moepeft.evaluation.tables.render import (
  PARAMETERS,
  PERCENT,
  SEEDS,
  Cell,
  Column,
  Line,
  Table,
)
from moepeft.evaluation.tables.run_results import RunResults
from moepeft.evaluation.tables.seeds import SeedGroup
from moepeft.peft.method_text import canonical_text
from moepeft.runs.run import Run


def columns(keys: Sequence[ColumnKey]) -> list[Column]:
  """A column for each key, with a name of its own."""
  several = len({k.data for k in keys if k.dataset in EIGHT}) > 1
  return [_column(key, _name(key, several)) for key in keys]


def _column(key: ColumnKey, name: str) -> Column:
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


def _name(key: ColumnKey, several: bool) -> str:
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


def _is_group(key: ColumnKey) -> bool:
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
  all_entries = _read_runs(runs)
  entries = aggregate.without_after_evaluations(all_entries)
  comparable.check_comparable(entries)
  rows = _table_rows(entries, printed, routing)
  keys = sorted(
    {key for row in rows for key in row.estimates}, key=aggregate.column_order
  )
  metric_columns, routing_columns = columns(keys), []
  if routing:
    routing_columns = routing_tables.columns(row.routing for row in rows)
  shown = [*metric_columns, *routing_columns]
  baseline_row = _baseline_row(rows, baseline) if baseline else None
  majority = _majority([row.estimates for row in rows], keys)
  lines = _lines(rows, bool(printed), baseline_row)
  row_of_line = {
    i: row for i, (_, row) in enumerate(lines, len(majority)) if row is not None
  }
  notes = [
    *_notes(rows, keys, shown, baseline_row),
    *footnotes.after_evaluation_notes(all_entries, entries),
  ]
  if routing:
    notes += routing_tables.notes(routing_columns)
  if printed:
    in_paper = [row.printed for row in rows if row.printed]
    notes += footnotes.paper_notes(paper, in_paper)
  return Table(
    (PARAMETERS, PERCENT, SEEDS, *shown),
    (*majority, *(line for line, _ in lines)),
    tuple(notes),
    title,
    decimals=2 if printed else 1,
    best=_best(row_of_line, metric_columns),
  )


@dataclasses.dataclass(frozen=True)
class _TableRow:
  """A row of the table.

  Attributes:
    group: its runs, one a seed.
    by_seed: the estimates of each.
    estimates, draws: their means, and bootstrap draws of these.
    printed: the paper's row of the same method.
    routing: cells about its routers.
  """

  group: SeedGroup
  by_seed: Sequence[Mapping[ColumnKey, Estimate]]
  estimates: Mapping[ColumnKey, Estimate]
  draws: Mapping[ColumnKey, np.ndarray]
  printed: Published | None
  routing: Mapping[str, Cell]


def _table_rows(
  entries: Sequence[RunResults], printed: Sequence[Published], routing: bool
) -> list[_TableRow]:
  rows = []
  for group in seeds.group_by_seed(entries):
    by_seed = [aggregate.estimates_of(entry) for entry in group.entries]
    draws = aggregate.mean_draws(group.entries)
    rows.append(
      _TableRow(
        group,
        by_seed,
        aggregate.mean_over_seeds(by_seed, draws),
        draws,
        _published_row(printed, group.first),
        routing_tables.cells(group.entries) if routing else {},
      )
    )
  return rows


def _notes(
  rows: Sequence[_TableRow],
  keys: Sequence[ColumnKey],
  shown: Sequence[Column],
  baseline_row: _TableRow | None,
) -> list[str]:
  groups = [row.group for row in rows]
  notes = [
    *footnotes.run_notes(groups, [row.estimates for row in rows], keys),
    *footnotes.bold_note(groups),
    *footnotes.missing_notes(groups, [row.by_seed for row in rows], shown),
  ]
  if baseline_row is not None and any(
    cell.low is not None
    for row in rows
    if row is not baseline_row
    for cell in _difference_line(row, baseline_row).cells.values()
  ):
    notes.append(footnotes.baseline_note(baseline_row.group))
  return notes


def _read_runs(runs: Sequence[str]) -> list[RunResults]:
  defaults = json.loads(config_lib.default().to_json())
  # A shell's glob and completion end a folder with a slash.
  paths = [run.rstrip('/') or run for run in runs]
  return [entry for path in paths for entry in run_results.read(path, defaults)]


def _lines(
  rows: Sequence[_TableRow], paper: bool, baseline_row: _TableRow | None
) -> list[tuple[Line, _TableRow | None]]:
  """A row's line with the row, then its differences; bases first."""
  lines = []
  for row in sorted(rows, key=lambda row: not row.group.first.is_base):
    lines.append((_line(row, paper), row))
    if baseline_row is not None and row is not baseline_row:
      lines.append((_difference_line(row, baseline_row), None))
    if row.printed is not None:
      lines += [
        (line, None) for line in _paper_lines(row.printed, row.estimates)
      ]
  return lines


def _best(
  rows: Mapping[int, _TableRow], columns: Sequence[Column]
) -> frozenset[tuple[int, ColumnKey]]:
  """(line, key) of figures that are clearly the best of their column.

  The 95 % interval of the difference from each other row, over the same
  resamples, has no 0; a figure without draws is not told from the others.
  """
  best = set()
  for column in columns:
    key = column.key
    sign = 1 if column.better == 'higher' else -1
    there = {i: row for i, row in rows.items() if key in row.estimates}
    if len(there) < 2:
      continue
    top = max(there, key=lambda i: sign * there[i].estimates[key].value)
    rest = [row for i, row in there.items() if i != top]
    if all(key in row.draws for row in there.values()) and all(
      bootstrap.interval(sign * (there[top].draws[key] - row.draws[key]))[0] > 0
      for row in rest
    ):
      best.add((top, key))
  return frozenset(best)


def _published_row(
  printed: Sequence[Published], entry: RunResults
) -> Published | None:
  """The paper's row of a run's method."""
  if entry.is_base or not printed:
    return None
  method = canonical_text(entry.method, entry.semantics)
  for row in printed:
    if row.method and canonical_text(row.method, entry.semantics) == method:
      return row
  return None


def _baseline_row(rows: Sequence[_TableRow], baseline: str) -> _TableRow:
  """The row that --baseline names, by a work directory or by its method."""
  path = os.path.abspath(os.path.expanduser(baseline))
  matching = [
    row
    for row in rows
    if path in {os.path.abspath(e.folder) for e in row.group.entries}
    and not row.group.first.is_base
  ] or [row for row in rows if _same_method(row.group.first, baseline)]
  if len(matching) != 1:
    there = ', '.join(dict.fromkeys(row.group.first.method for row in rows))
    raise ValueError(
      f'--baseline={baseline} names {len(matching)} rows, expected one; the '
      f'methods are {there}: give one of them, or its work directory'
    )
  return matching[0]


def _same_method(entry: RunResults, text: str) -> bool:
  if entry.is_base or text == run_results.BASE:
    return entry.method == text
  try:
    return canonical_text(entry.method, entry.semantics) == canonical_text(
      text, entry.semantics
    )
  except ValueError:
    # Neither a method nor a run: the caller lists what there is.
    return False


def _line(row: _TableRow, paper: bool) -> Line:
  first, qualifier = row.group.first, row.group.qualifier
  if paper and row.printed is None and not first.is_base:
    qualifier = f'{qualifier} (not in the paper)'
  cells: dict[Any, Cell] = {
    k: _cell(figure) for k, figure in row.estimates.items()
  }
  cells |= row.routing
  if not first.is_base:
    trained, base = _parameter_counts(first)
    cells[PARAMETERS.key] = Cell(trained)
    cells[PERCENT.key] = Cell(100 * trained / base)
    cells[SEEDS.key] = Cell(len(row.group.entries))
  kind = 'base' if first.is_base else 'run'
  return Line(kind, first.method, qualifier.strip(), cells=cells)


def _parameter_counts(entry: RunResults) -> tuple[int, int]:
  """(trained, of the base), from the rows or else from shapes."""
  if entry.parameters is not None:
    return entry.parameters, entry.base_parameters
  counted = count(Run(entry.folder).load_config())
  return counted['peft'], counted['params']


def _cell(figure: Estimate) -> Cell:
  return Cell(figure.value, figure.low, figure.high, figure.seeds)


def _majority(
  by_row: Sequence[Mapping[ColumnKey, Estimate]], keys
) -> list[Line]:
  cells = {}
  for key in keys:
    values = [row[key].majority for row in by_row if key in row]
    numbers = [value for value in values if value is not None]
    if numbers:
      cells[key] = Cell(float(np.mean(numbers)))
  return [Line('majority', '', 'majority', cells=cells)] if cells else []


def _paired(row: _TableRow, baseline: _TableRow) -> bool:
  """Whether held-out examples of both are the same: by seed, if embedded."""
  entries = (*row.group.entries, *baseline.group.entries)
  if not any(entry.generates_tasks for entry in entries):
    return True
  row_seeds, baseline_seeds = (
    {e.seed for e in r.group.entries} for r in (row, baseline)
  )
  return row_seeds == baseline_seeds


def _difference_line(row: _TableRow, baseline: _TableRow) -> Line:
  draws = row.draws
  if not _paired(row, baseline):
    # What is drawn anew for every seed is not the same examples.
    draws = {key: drawn for key, drawn in draws.items() if key.data != HELD_OUT}
  baseline_values = (baseline.estimates, baseline.draws)
  differences = aggregate.differences((row.estimates, draws), baseline_values)
  cells = {key: _cell(figure) for key, figure in differences.items()}
  words = ('less', baseline.group.first.method, baseline.group.qualifier)
  return Line('difference', '', ' '.join(filter(None, words)), cells=cells)


def _paper_lines(
  printed: Published, estimates: Mapping[ColumnKey, Estimate]
) -> list[Line]:
  """The paper's line, and ours less the paper's."""
  there = printed.cells()
  paper: dict[Any, Cell] = {
    key: Cell(there[key.dataset])
    for key in estimates
    if _is_in_paper(key) and key.dataset in there
  }
  less = {}
  for key in paper:
    estimate, value = estimates[key], there[key.dataset]
    bounds = (estimate.low, estimate.high)
    low, high = (None if x is None else x - value for x in bounds)
    less[key] = Cell(estimate.value - value, low, high)
  if printed.percent is not None:
    paper[PERCENT.key] = Cell(printed.percent)
  name = 'paper' if printed.name == printed.method else f'paper: {printed.name}'
  return [
    Line('paper', '', name, cells=paper),
    Line('difference', '', 'less the paper', cells=less),
  ]


def _is_in_paper(key: ColumnKey) -> bool:
  return key.metric == ACCURACY and key.dataset in (*EIGHT, AVERAGE)


def _paper_alone(size: str, printed: Sequence[Published], title: str) -> Table:
  keys = [ColumnKey(_PRINTED, ACCURACY, name) for name in (*EIGHT, AVERAGE)]
  lines, notes = [], footnotes.paper_notes(size, ())
  for row in printed:
    remark = footnotes.published_row_note(row)
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
    is_method = row.name == row.method
    lines.append(
      Line(
        'run',
        row.name if is_method else '',
        '' if is_method else row.name,
        mark,
        cells,
      )
    )
  shown = (PERCENT, *columns(keys))
  return Table(shown, tuple(lines), tuple(notes), title)
