# SPDX-License-Identifier: Apache-2.0
"""A table as a picture: a panel a column, a dot with its interval a method."""

import math
import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moepeft.evaluation.tables import render as table_render
from moepeft.evaluation.tables.render import PARAMETERS, PERCENT, Line, Table

# Okabe and Ito's, which the colour-blind can tell apart.
_BLUE, _ORANGE, _GREY = '#0072B2', '#D55E00', '#666666'
_DPI = 120
# Panels side by side; inches of a panel, a line and the rest.
_ACROSS, _WIDTH, _LINE, _REST = 4, 2.6, 0.36, 1.1
# Lines that the dots of seeds lie below their mean.
_SEEDS_BELOW = 0.27


def draw(table: Table, path: str) -> None:
  """Writes a PNG: whole or not at all.

  Seeds are small dots, the paper's values hollow, the majority's a dotted line.
  An axis ends where the metric does.

  Raises:
    ValueError: no figure of a run is there to be drawn.
  """
  columns = [c for c in table.columns if c.kind == 'score']
  lines = [line for line in table.lines if line.kind in ('run', 'base')]
  columns = [c for c in columns if any(c.key in line.cells for line in lines)]
  if not columns:
    raise ValueError('there is no figure to draw; leave --output out')
  across = min(_ACROSS, len(columns))
  down = math.ceil(len(columns) / across)
  names = [_name(line) for line in lines]
  room = 0.075 * max(len(part) for name in names for part in name.split('\n'))
  height = _LINE * len(lines) + _REST
  figure = Figure(
    figsize=(room + _WIDTH * across, 0.6 + height * down), layout='constrained'
  )
  figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
  grid = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
  for axes, column in zip(grid, columns, strict=False):
    _panel(axes, table, lines, column)
  for axes in grid[len(columns) :]:
    axes.set_axis_off()
  # All panels share this axis.
  grid[0].set_yticks(np.arange(len(lines)), names)
  grid[0].set_ylim(len(lines) - 0.4, -0.6)
  if table.title:
    figure.suptitle(table.title, x=0.01, ha='left')
  _legend(figure, table)
  _save(figure, path)


def _panel(axes: Axes, table: Table, lines: list[Line], column) -> None:
  papers = _papers(table)
  for y, line in enumerate(lines):
    color = _GREY if line.kind == 'base' else _BLUE
    cell = line.cells.get(column.key)
    if cell is not None:
      if cell.low is not None:
        axes.plot([cell.low, cell.high], [y, y], color=color, lw=1.8)
      below = [y + _SEEDS_BELOW] * len(cell.seeds)
      dots = axes.plot(
        cell.seeds, below, '.', color=color, alpha=0.7, ms=6, mew=0
      )
      dots += axes.plot(cell.value, y, 'o', color=color, ms=5)
      for dot in dots:
        # Whole at the end of an axis, too.
        dot.set(clip_on=False, in_layout=False)
    printed = papers.get(id(line), {}).get(column.key)
    if printed is not None:
      axes.plot(
        printed.value, y, 'D', ms=6, mfc='none', mec=_ORANGE, mew=1.4, zorder=3
      )
  for line in table.lines:
    if line.kind == 'majority' and column.key in line.cells:
      at = line.cells[column.key].value
      axes.axvline(at, color=_GREY, ls=':', lw=1.2)
  axes.set_title(f'{column.name} ({column.unit})', fontsize=10, loc='left')
  axes.tick_params(labelsize=8)
  axes.set_xlim(*_limits(table, lines, column))
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='x', alpha=0.3, lw=0.6)


def _limits(table: Table, lines: list[Line], column) -> tuple[float, float]:
  """The figures with some room beside them, within what a figure can be."""
  papers = _papers(table).values()
  cells = [
    *(line.cells.get(column.key) for line in lines),
    *(paper_cells.get(column.key) for paper_cells in papers),
    *(o.cells.get(column.key) for o in table.lines if o.kind == 'majority'),
  ]
  numbers = [
    number
    for cell in cells
    if cell is not None
    for number in (cell.value, cell.low, cell.high, *cell.seeds)
    if number is not None and math.isfinite(number)
  ]
  least, most = column.bounds
  low, high = min(numbers, default=0), max(numbers, default=1)
  # Of equal figures, a hundredth of them.
  room = 0.08 * (high - low) or 0.01 * max(abs(high), 1)
  return max(low - room, least), min(high + room, most)


def _papers(table: Table) -> dict[int, dict]:
  """{id of a run's line: the cells of the paper's line below it}."""
  papers, last = {}, None
  for line in table.lines:
    if line.kind == 'run':
      last = line
    elif line.kind == 'paper' and last is not None:
      papers[id(last)] = dict(line.cells)
  return papers


def _name(line: Line) -> str:
  """A line's label, with the size of a run below it."""
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
