# SPDX-License-Identifier: Apache-2.0
"""Builds tables that compare runs with each other, a baseline and the paper."""

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
from moepeft.evaluation.tables import cost as cost_tables
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
  """A column for each key; names are distinct."""
  show_data = len({k.data for k in keys if k.dataset in EIGHT}) > 1
  return [_column(key, _column_name(key, show_data)) for key in keys]


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


def _column_name(key: ColumnKey, show_data: bool) -> str:
  metric = key.metric.replace('_', ' ')
  if key.data == HELD_OUT and not key.dataset:
    return f'held-out {metric}'
  if _is_group(key):
    name = key.dataset.replace('_', '-')
    return name if metric == ACCURACY else f'{name} {metric}'
  if key.dataset in ('', MEAN):
    return f'{key.data} {metric}'
  name = key.dataset if metric == ACCURACY else f'{key.dataset} {metric}'
  return f'{name} ({key.data})' if show_data else name


def _is_group(key: ColumnKey) -> bool:
  """Whether a column is of a group of embedded tasks."""
  paper_datasets = (*EIGHT, *ROUNDS, AVERAGE)
  return key.data == AFTER or (
    key.data == HELD_OUT and key.dataset not in paper_datasets
  )


# `ColumnKey.data` of a table of the paper without runs.
_PAPER_DATA = 'paper'


def table(
  runs: Sequence[str],
  paper: str = '',
  baseline: str = '',
  title: str = '',
  routing: bool = False,
  cost: bool = False,
) -> Table:
  """Makes the table of work directories, in the order they are given.

  Args:
    runs: work directories; without any, the table is the paper's.
    paper: a table of the paper whose rows are added, or ''.
    baseline: a method or a work directory that the others are compared with.
    title: the table's title.
    routing: whether to add columns about the runs' routers.
    cost: whether to add columns about FLOPs, step time and memory.

  Raises:
    ValueError: there is neither a run nor a table, there is no such table or
      baseline, or runs are damaged or not comparable.
  """
  paper_rows = published.table(paper) if paper else ()
  if not runs:
    if not paper_rows:
      raise ValueError(
        'name the work directories of runs, or a table with --paper=t5_xl'
      )
    return _paper_table(paper, paper_rows, title)
  all_entries = _read_runs(runs)
  entries = aggregate.without_after_evaluations(all_entries)
  comparable.check_comparable(entries)
  rows = _table_rows(entries, paper_rows, routing)
  keys = sorted(
    {key for row in rows for key in row.estimates}, key=aggregate.column_order
  )
  metric_columns, routing_columns = columns(keys), []
  if routing:
    routing_columns = routing_tables.columns(row.routing for row in rows)
  value_columns = [*metric_columns, *routing_columns]
  cost_notes = []
  if cost:
    rows, cost_notes = _with_cost(rows, baseline)
    value_columns += cost_tables.COLUMNS
  baseline_row = _baseline_row(rows, baseline) if baseline else None
  majority = _majority_lines([row.estimates for row in rows], keys)
  lines = _make_lines(rows, bool(paper_rows), baseline_row)
  row_of_line = {
    i: row for i, (_, row) in enumerate(lines, len(majority)) if row is not None
  }
  notes = [
    *_make_notes(rows, keys, value_columns, baseline_row),
    *footnotes.after_evaluation_notes(all_entries, entries),
  ]
  if routing:
    notes += routing_tables.notes(routing_columns)
  notes += cost_notes
  if paper_rows:
    matching = [row.paper_row for row in rows if row.paper_row]
    notes += footnotes.paper_notes(paper, matching)
  return Table(
    (PARAMETERS, PERCENT, SEEDS, *value_columns),
    (*majority, *(line for line, _ in lines)),
    tuple(notes),
    title,
    decimals=2 if paper_rows else 1,
    best=_best_cells(row_of_line, metric_columns),
  )


@dataclasses.dataclass(frozen=True)
class _TableRow:
  """A row of the table.

  Attributes:
    group: the row's runs, one per seed.
    by_seed: the estimates of each run.
    estimates, draws: the means over seeds, and bootstrap draws of them.
    paper_row: the paper's row of the same method, if there is one.
    routing, cost: cells about the routers and about the cost of training.
  """

  group: SeedGroup
  by_seed: Sequence[Mapping[ColumnKey, Estimate]]
  estimates: Mapping[ColumnKey, Estimate]
  draws: Mapping[ColumnKey, np.ndarray]
  paper_row: Published | None
  routing: Mapping[str, Cell]
  cost: Mapping[str, Cell] = dataclasses.field(default_factory=dict)


def _table_rows(
  entries: Sequence[RunResults],
  paper_rows: Sequence[Published],
  routing: bool,
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
        _find_paper_row(paper_rows, group.first),
        routing_tables.cells(group.entries) if routing else {},
      )
    )
  return rows


def _with_cost(
  rows: Sequence[_TableRow], baseline: str
) -> tuple[list[_TableRow], list[str]]:
  """(rows with times over the baseline's or the first run's, footnotes)."""
  configs = {
    i: Run(row.group.first.folder).load_config()
    for i, row in enumerate(rows)
    if not row.group.first.is_base
  }
  if not configs:
    raise ValueError('--cost is for runs, and there are bases alone')
  baseline_row = _baseline_row(rows, baseline) if baseline else None
  first = next(iter(configs))
  reference = next((i for i in configs if rows[i] is baseline_row), first)
  cells = cost_tables.measure(configs, reference)
  rows = [
    dataclasses.replace(row, cost=cells.get(i, {}))
    for i, row in enumerate(rows)
  ]
  return rows, cost_tables.notes(footnotes.row_label(rows[reference].group))


def _make_notes(
  rows: Sequence[_TableRow],
  keys: Sequence[ColumnKey],
  value_columns: Sequence[Column],
  baseline_row: _TableRow | None,
) -> list[str]:
  groups = [row.group for row in rows]
  notes = [
    *footnotes.run_notes(groups, [row.estimates for row in rows], keys),
    *footnotes.bold_note(groups),
    *footnotes.missing_notes(
      groups, [row.by_seed for row in rows], value_columns
    ),
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
  # Shells complete a directory with a slash.
  paths = [run.rstrip('/') or run for run in runs]
  return [entry for path in paths for entry in run_results.read(path, defaults)]


def _make_lines(
  rows: Sequence[_TableRow], paper: bool, baseline_row: _TableRow | None
) -> list[tuple[Line, _TableRow | None]]:
  """(line, row), each followed by lines of differences and of the paper.

  Lines of bases come first; lines that are not of a row have None.
  """
  lines = []
  for row in sorted(rows, key=lambda row: not row.group.first.is_base):
    lines.append((_make_line(row, paper), row))
    if baseline_row is not None and row is not baseline_row:
      lines.append((_difference_line(row, baseline_row), None))
    if row.paper_row is not None:
      paper_lines = _paper_lines(row.paper_row, row.estimates)
      lines += [(line, None) for line in paper_lines]
  return lines


def _best_cells(
  rows: Mapping[int, _TableRow], columns: Sequence[Column]
) -> frozenset[tuple[int, ColumnKey]]:
  """(line, key) of the cells that are significantly the best of their column.

  The 95 % paired bootstrap interval of the difference from each other row does
  not contain 0. Columns in which a row has no draws have no best cell.
  """
  best = set()
  for column in columns:
    key = column.key
    sign = 1 if column.better == 'higher' else -1
    column_rows = {i: row for i, row in rows.items() if key in row.estimates}
    if len(column_rows) < 2:
      continue
    if not all(key in row.draws for row in column_rows.values()):
      continue
    top = max(
      column_rows, key=lambda i: sign * column_rows[i].estimates[key].value
    )
    top_draws = column_rows.pop(top).draws[key]
    if all(
      bootstrap.interval(sign * (top_draws - row.draws[key]))[0] > 0
      for row in column_rows.values()
    ):
      best.add((top, key))
  return frozenset(best)


def _find_paper_row(
  paper_rows: Sequence[Published], entry: RunResults
) -> Published | None:
  """The paper's row of a run's method, if there is one."""
  if entry.is_base or not paper_rows:
    return None
  method = canonical_text(entry.method, entry.semantics)
  for row in paper_rows:
    if row.method and canonical_text(row.method, entry.semantics) == method:
      return row
  return None


def _baseline_row(rows: Sequence[_TableRow], baseline: str) -> _TableRow:
  """The row that --baseline names by its work directory or its method."""
  path = os.path.abspath(os.path.expanduser(baseline))
  matching = [
    row
    for row in rows
    if path in {os.path.abspath(e.folder) for e in row.group.entries}
    and not row.group.first.is_base
  ] or [row for row in rows if _same_method(row.group.first, baseline)]
  if len(matching) != 1:
    methods = ', '.join(dict.fromkeys(row.group.first.method for row in rows))
    raise ValueError(
      f'--baseline={baseline} names {len(matching)} rows, expected one; the '
      f'methods are {methods}: give one of them, or its work directory'
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
    # Not a method string; the caller raises an error with all methods.
    return False


def _make_line(row: _TableRow, paper: bool) -> Line:
  first, qualifier = row.group.first, row.group.qualifier
  if paper and row.paper_row is None and not first.is_base:
    qualifier = f'{qualifier} (not in the paper)'
  cells: dict[Any, Cell] = {
    key: _to_cell(estimate) for key, estimate in row.estimates.items()
  }
  cells |= row.routing | row.cost
  if not first.is_base:
    trained, base = _parameter_counts(first)
    cells[PARAMETERS.key] = Cell(trained)
    cells[PERCENT.key] = Cell(100 * trained / base)
    cells[SEEDS.key] = Cell(len(row.group.entries))
  kind = 'base' if first.is_base else 'run'
  return Line(kind, first.method, qualifier.strip(), cells=cells)


def _parameter_counts(entry: RunResults) -> tuple[int, int]:
  """Numbers of (trained, base) parameters, from results or else from shapes."""
  if entry.parameters is not None:
    return entry.parameters, entry.base_parameters
  counts = count(Run(entry.folder).load_config())
  return counts['peft'], counts['params']


def _to_cell(estimate: Estimate) -> Cell:
  return Cell(estimate.value, estimate.low, estimate.high, estimate.seeds)


def _majority_lines(
  by_row: Sequence[Mapping[ColumnKey, Estimate]], keys
) -> list[Line]:
  cells = {}
  for key in keys:
    majorities = [row[key].majority for row in by_row if key in row]
    values = [value for value in majorities if value is not None]
    if values:
      cells[key] = Cell(float(np.mean(values)))
  return [Line('majority', '', 'majority', cells=cells)] if cells else []


def _is_paired(row: _TableRow, baseline: _TableRow) -> bool:
  """Whether two rows have the same held-out examples.

  Those of embedded tasks depend on the seed.
  """
  entries = (*row.group.entries, *baseline.group.entries)
  if not any(entry.generates_tasks for entry in entries):
    return True
  row_seeds, baseline_seeds = (
    {e.seed for e in r.group.entries} for r in (row, baseline)
  )
  return row_seeds == baseline_seeds


def _difference_line(row: _TableRow, baseline: _TableRow) -> Line:
  draws = row.draws
  if not _is_paired(row, baseline):
    draws = {key: d for key, d in draws.items() if key.data != HELD_OUT}
  differences = aggregate.differences(
    (row.estimates, draws), (baseline.estimates, baseline.draws)
  )
  cells = {key: _to_cell(estimate) for key, estimate in differences.items()}
  parts = ('less', baseline.group.first.method, baseline.group.qualifier)
  return Line('difference', '', ' '.join(filter(None, parts)), cells=cells)


def _paper_lines(
  paper_row: Published, estimates: Mapping[ColumnKey, Estimate]
) -> list[Line]:
  """The paper's line, and the line of our estimates minus the paper's."""
  values = paper_row.cells()
  paper: dict[Any, Cell] = {
    key: Cell(values[key.dataset])
    for key in estimates
    if _is_in_paper(key) and key.dataset in values
  }
  differences = {}
  for key in paper:
    estimate, value = estimates[key], values[key.dataset]
    bounds = (estimate.low, estimate.high)
    low, high = (None if x is None else x - value for x in bounds)
    differences[key] = Cell(estimate.value - value, low, high)
  if paper_row.percent is not None:
    paper[PERCENT.key] = Cell(paper_row.percent)
  name = 'paper'
  if paper_row.name != paper_row.method:
    name = f'paper: {paper_row.name}'
  return [
    Line('paper', '', name, cells=paper),
    Line('difference', '', 'less the paper', cells=differences),
  ]


def _is_in_paper(key: ColumnKey) -> bool:
  return key.metric == ACCURACY and key.dataset in (*EIGHT, AVERAGE)


def _paper_table(
  size: str, paper_rows: Sequence[Published], title: str
) -> Table:
  keys = [ColumnKey(_PAPER_DATA, ACCURACY, name) for name in (*EIGHT, AVERAGE)]
  lines, notes = [], footnotes.paper_notes(size, ())
  for row in paper_rows:
    row_note = footnotes.published_row_note(row)
    mark = ''
    if row_note:
      mark = str(1 + sum(note.startswith('[') for note in notes))
      notes.append(f'[{mark}] {row_note}')
    values = row.cells()
    cells: dict[Any, Cell] = {
      key: Cell(values[key.dataset]) for key in keys if key.dataset in values
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
  return Table((PERCENT, *columns(keys)), tuple(lines), tuple(notes), title)
