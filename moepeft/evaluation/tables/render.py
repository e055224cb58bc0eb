# SPDX-License-Identifier: Apache-2.0
"""Renders tables as Markdown and as LaTeX with booktabs."""

import dataclasses
import re
from collections.abc import Hashable, Mapping

MISSING = '-'
# Kinds of lines that may have the best cell of a column.
_RANKED_KINDS = ('run', 'base')


@dataclasses.dataclass(frozen=True)
class Column:
  """A column.

  Attributes:
    key: the key of its cells in `Line.cells`.
    name: its header.
    kind: 'count' (1,234,567), 'share' (three digits) or 'score'.
    better: 'higher' or 'lower', or '' for a column without a best cell.
    unit: a score's unit.
    bounds: the minimum and maximum of a score.
    decimals: a score's decimals; None for the table's.
  """

  key: Hashable
  name: str
  kind: str
  better: str = ''
  unit: str = ''
  bounds: tuple[float, float] = (0.0, 100.0)
  decimals: int | None = None


PARAMETERS = Column('parameters', 'parameters', 'count')
PERCENT = Column('percent', '% of base', 'share')
SEEDS = Column('seeds', 'seeds', 'count')


@dataclasses.dataclass(frozen=True)
class Cell:
  """A value, with the ends of its confidence interval if it has one.

  Attributes:
    seeds: the value of each seed, for a mean over several seeds.
  """

  value: float
  low: float | None = None
  high: float | None = None
  seeds: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Line:
  """A row of a table.

  Attributes:
    kind: 'run', 'base', 'majority', 'paper', or 'difference', whose values
      are printed with a sign.
    label: a method, printed as code, or ''.
    qualifier: plain text after the label.
    mark: a footnote mark, or ''.
    cells: column key -> cell; other cells are printed as missing.
  """

  kind: str
  label: str
  qualifier: str = ''
  mark: str = ''
  cells: Mapping[Hashable, Cell] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
  """A table with footnotes.

  Attributes:
    decimals: decimals of scores; the paper prints two.
    best: (line index, column key) of bold cells. None, for tables without
      confidence intervals, makes the best printed value of each column bold.
  """

  columns: tuple[Column, ...]
  lines: tuple[Line, ...]
  notes: tuple[str, ...] = ()
  title: str = ''
  decimals: int = 2
  best: frozenset[tuple[int, Hashable]] | None = None


def format_number(
  cell: Cell | None, column: Column, decimals: int = 2, signed: bool = False
) -> str:
  """Formats a cell: '60.79', '60.79 ± 1.20', '+0.30', '1,234,567' or '-'.

  The number after ± is half the width of the interval.
  """
  if cell is None:
    return MISSING
  if column.kind == 'count':
    return f'{cell.value:,.0f}'
  if column.kind == 'share':
    return f'{cell.value:.3g}'
  if column.decimals is not None:
    decimals = column.decimals
  text = f'{cell.value:{"+" if signed else ""}.{decimals}f}'
  # Avoids '-0.00'.
  if float(text) == 0:
    text = text.replace('-', '+' if signed else '')
  if cell.low is None:
    return text
  return f'{text} ± {(cell.high - cell.low) / 2:.{decimals}f}'


def bold_cells(table: Table) -> set[tuple[int, Hashable]]:
  """(line index, column key) of the bold cells.

  Without `table.best` they are the best printed values of each column, ties
  included, if at least two lines have a value.
  """
  if table.best is not None:
    return set(table.best)
  bold = set()
  for column in table.columns:
    decimals = table.decimals if column.decimals is None else column.decimals
    values = {
      i: round(line.cells[column.key].value, decimals)
      for i, line in enumerate(table.lines)
      if line.kind in _RANKED_KINDS and column.key in line.cells
    }
    if column.better and len(values) > 1:
      top = (max if column.better == 'higher' else min)(values.values())
      bold |= {(i, column.key) for i, v in values.items() if v == top}
  return bold


def markdown(table: Table) -> str:
  """Renders a table as Markdown that is aligned in a terminal, too."""
  head = ['method', *(column.name for column in table.columns)]
  bold, body = bold_cells(table), []
  for i, line in enumerate(table.lines):
    label = f'`{line.label}`' if line.label else ''
    cells = [_join_label(label, line)]
    for column, text in zip(
      table.columns, cell_texts(table, line), strict=True
    ):
      cells.append(f'**{text}**' if (i, column.key) in bold else text)
    body.append([cell.replace('|', '\\|') for cell in cells])
  widths = [max(map(len, cells)) for cells in zip(head, *body, strict=True)]
  rule = ['-' * widths[0], *('-' * (w - 1) + ':' for w in widths[1:])]
  lines = [_align_row(row, widths) for row in (head, rule, *body)]
  if table.title:
    lines = [f'**{table.title}**', '', *lines]
  if table.notes:
    lines += ['', *(f'- {note}' for note in table.notes)]
  return '\n'.join(lines) + '\n'


def latex(table: Table) -> str:
  """Renders a table as LaTeX for the packages booktabs and graphicx."""
  bold, body = bold_cells(table), []
  for i, line in enumerate(table.lines):
    label = f'\\texttt{{{escape_latex(line.label)}}}' if line.label else ''
    plain = dataclasses.replace(line, qualifier=escape_latex(line.qualifier))
    cells = [_join_label(label, plain)]
    for column, text in zip(
      table.columns, cell_texts(table, line), strict=True
    ):
      text = escape_latex(text)
      cells.append(f'\\textbf{{{text}}}' if (i, column.key) in bold else text)
    body.append(' & '.join(cells) + r' \\')
  names = ['method', *(column.name for column in table.columns)]
  return '\n'.join(
    [
      '% needs \\usepackage{booktabs,graphicx}',
      r'\begin{table}',
      r'\centering',
      *([f'\\caption{{{escape_latex(table.title)}}}'] if table.title else []),
      r'\resizebox{\textwidth}{!}{%',
      f'\\begin{{tabular}}{{l{"r" * len(table.columns)}}}',
      r'\toprule',
      ' & '.join(map(escape_latex, names)) + r' \\',
      r'\midrule',
      *body,
      r'\bottomrule',
      r'\end{tabular}}',
      *(
        f'\n{{\\footnotesize {escape_latex(note)}\\par}}'
        for note in table.notes
      ),
      r'\end{table}',
      '',
    ]
  )


def cell_texts(table: Table, line: Line) -> list[str]:
  """The cells of a line as text, one per column."""
  return [
    format_number(
      line.cells.get(column.key),
      column,
      table.decimals,
      signed=line.kind == 'difference',
    )
    for column in table.columns
  ]


def plain_label(line: Line) -> str:
  """A line's label, qualifier and footnote mark, without markup."""
  return _join_label(line.label, line)


_SPECIAL = {
  '\\': r'\textbackslash{}',
  '&': r'\&',
  '%': r'\%',
  '$': r'\$',
  '#': r'\#',
  '_': r'\_',
  '{': r'\{',
  '}': r'\}',
  '~': r'\textasciitilde{}',
  '^': r'\textasciicircum{}',
  '±': r'$\pm$',
  '−': '$-$',
  '×': r'$\times$',
  '`': '',
}


def escape_latex(text: str) -> str:
  """Escapes text for LaTeX; the hyphen of a negative number becomes a minus."""
  text = re.sub(r'(?<![\w-])-(?=\d)', '−', text)
  return ''.join(_SPECIAL.get(c, c) for c in text)


def _join_label(label: str, line: Line) -> str:
  mark = f'[{line.mark}]' if line.mark else ''
  return ' '.join(filter(None, (label, line.qualifier, mark)))


def _align_row(cells: list[str], widths: list[int]) -> str:
  first = cells[0].ljust(widths[0])
  numbers = (c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))
  return f'| {" | ".join((first, *numbers))} |'
