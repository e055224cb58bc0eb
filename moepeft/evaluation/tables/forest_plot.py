# SPDX-License-Identifier: Apache-2.0
"""Forest plots of tables: a panel per column, an interval per method."""

import math
import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moepeft.evaluation.tables import render as table_render
from moepeft.evaluation.tables.render import PARAMETERS, PERCENT, Line, Table

# From the palette of Okabe and Ito, which is colour-blind safe.
_BLUE, _ORANGE, _GREY = '#0072B2', '#D55E00', '#666666'
_DPI = 120
_MAX_PANELS_PER_ROW = 4
# In inches; a panel has _AXES_HEIGHT besides its lines.
_PANEL_WIDTH, _LINE_HEIGHT, _AXES_HEIGHT = 2.6, 0.36, 1.1
# Offset of the seeds' dots below their mean, in lines.
_SEEDS_OFFSET = 0.27


def draw(table: Table, path: str) -> None:
  """Draws a table and writes a PNG, atomically.

  Seeds are small dots, the paper's values hollow diamonds, and the majority's
  value is a dotted line. Axes end at the metric's bounds.

  Raises:
    ValueError: no run has a score.
  """
  columns = [c for c in table.columns if c.kind == 'score']
  lines = [line for line in table.lines if line.kind in ('run', 'base')]
  columns = [c for c in columns if any(c.key in line.cells for line in lines)]
  if not columns:
    raise ValueError('there is no figure to draw; leave --output out')
  num_columns = min(_MAX_PANELS_PER_ROW, len(columns))
  num_rows = math.ceil(len(columns) / num_columns)
  labels = [_label(line) for line in lines]
  label_width = 0.075 * max(
    len(part) for label in labels for part in label.split('\n')
  )
  height = _LINE_HEIGHT * len(lines) + _AXES_HEIGHT
  figure = Figure(
    figsize=(
      label_width + _PANEL_WIDTH * num_columns,
      0.6 + height * num_rows,
    ),
    layout='constrained',
  )
  figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
  grid = figure.subplots(
    num_rows, num_columns, sharey=True, squeeze=False
  ).ravel()
  for axes, column in zip(grid, columns, strict=False):
    _draw_panel(axes, table, lines, column)
  for axes in grid[len(columns) :]:
    axes.set_axis_off()
  # All panels share this axis.
  grid[0].set_yticks(np.arange(len(lines)), labels)
  grid[0].set_ylim(len(lines) - 0.4, -0.6)
  if table.title:
    figure.suptitle(table.title, x=0.01, ha='left')
  _legend(figure, table)
  _save(figure, path)


def _draw_panel(axes: Axes, table: Table, lines: list[Line], column) -> None:
  paper_cells = _paper_cells(table)
  for y, line in enumerate(lines):
    color = _GREY if line.kind == 'base' else _BLUE
    cell = line.cells.get(column.key)
    if cell is not None:
      if cell.low is not None:
        axes.plot([cell.low, cell.high], [y, y], color=color, lw=1.8)
      seeds_y = [y + _SEEDS_OFFSET] * len(cell.seeds)
      dots = axes.plot(
        cell.seeds, seeds_y, '.', color=color, alpha=0.7, ms=6, mew=0
      )
      dots += axes.plot(cell.value, y, 'o', color=color, ms=5)
      for dot in dots:
        # Not clipped at the end of an axis.
        dot.set(clip_on=False, in_layout=False)
    paper_cell = paper_cells.get(id(line), {}).get(column.key)
    if paper_cell is not None:
      axes.plot(
        paper_cell.value,
        y,
        'D',
        ms=6,
        mfc='none',
        mec=_ORANGE,
        mew=1.4,
        zorder=3,
      )
  for line in table.lines:
    if line.kind == 'majority' and column.key in line.cells:
      majority = line.cells[column.key].value
      axes.axvline(majority, color=_GREY, ls=':', lw=1.2)
  axes.set_title(f'{column.name} ({column.unit})', fontsize=10, loc='left')
  axes.tick_params(labelsize=8)
  axes.set_xlim(*_limits(table, lines, column))
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='x', alpha=0.3, lw=0.6)


def _limits(table: Table, lines: list[Line], column) -> tuple[float, float]:
  """The range of the values with a margin, within the metric's bounds."""
  cells = [
    *(line.cells.get(column.key) for line in lines),
    *(row.get(column.key) for row in _paper_cells(table).values()),
    *(
      line.cells.get(column.key)
      for line in table.lines
      if line.kind == 'majority'
    ),
  ]
  values = [
    value
    for cell in cells
    if cell is not None
    for value in (cell.value, cell.low, cell.high, *cell.seeds)
    if value is not None and math.isfinite(value)
  ]
  lower, upper = column.bounds
  low, high = min(values, default=0), max(values, default=1)
  # Equal values have no range; the margin is relative to the value.
  margin = 0.08 * (high - low) or 0.01 * max(abs(high), 1)
  return max(low - margin, lower), min(high + margin, upper)


def _paper_cells(table: Table) -> dict[int, dict]:
  """id() of a run's line -> the cells of the paper's line after it."""
  paper_cells, run = {}, None
  for line in table.lines:
    if line.kind == 'run':
      run = line
    elif line.kind == 'paper' and run is not None:
      paper_cells[id(run)] = dict(line.cells)
  return paper_cells


def _label(line: Line) -> str:
  """A line's label, with a run's numbers of parameters below it."""
  sizes = [
    table_render.format_number(line.cells[column.key], column) + unit
    for column, unit in ((PARAMETERS, ''), (PERCENT, ' %'))
    if line.kind == 'run' and column.key in line.cells
  ]
  parts = table_render.plain_label(line), ', '.join(sizes)
  return '\n'.join(filter(None, parts))


def _legend(figure: Figure, table: Table) -> None:
  kinds = {line.kind for line in table.lines}
  handles = [
    Line2D([], [], color=_BLUE, marker='o', lw=1.8, label='run, 95 % interval')
  ]
  if any(cell.seeds for line in table.lines for cell in line.cells.values()):
    dot = dict(color=_BLUE, marker='.', ls='', mew=0, alpha=0.7)
    handles.append(Line2D([], [], label='one seed', **dot))
  if 'base' in kinds:
    handles.append(Line2D([], [], color=_GREY, marker='o', label='base'))
  if 'paper' in kinds:
    diamond = dict(ls='', marker='D', mfc='none', mec=_ORANGE)
    handles.append(Line2D([], [], label='paper', **diamond))
  if 'majority' in kinds:
    handles.append(Line2D([], [], color=_GREY, ls=':', label='majority'))
  if len(handles) > 1 or any(
    cell.low is not None for line in table.lines for cell in line.cells.values()
  ):
    figure.legend(
      handles=handles,
      loc='outside lower right',
      ncols=len(handles),
      frameon=False,
      fontsize=8,
    )


def _save(figure: Figure, path: str) -> None:
  temporary = f'{path}.tmp'
  figure.savefig(temporary, dpi=_DPI, format='png')
  os.replace(temporary, path)
