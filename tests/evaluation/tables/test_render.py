# SPDX-License-Identifier: Apache-2.0
"""Numbers as text, and text as Markdown and LaTeX."""

import pytest

from moepeft.evaluation.tables import render as table_render
from moepeft.evaluation.tables.render import Cell, Column, Line, Table

SCORE = Column('a', 'a_b', 'score', 'higher')
LOSS = Column('l', 'loss', 'score', 'lower', decimals=3)
COUNT = Column('n', 'parameters', 'count')
SHARE = Column('s', 'share', 'share')
NUMBERS = [
  (Cell(60.7851), SCORE, False, '60.79'),
  (Cell(60.79, 59.0, 61.4), SCORE, False, '60.79 ± 1.20'),
  (Cell(0.304), SCORE, True, '+0.30'),
  (Cell(-0.304, -1, 1), SCORE, True, '-0.30 ± 1.00'),
  (Cell(-0.001), SCORE, True, '+0.00'),
  (Cell(-0.001), SCORE, False, '0.00'),
  (Cell(0.0), SCORE, False, '0.00'),
  (Cell(2.13449, 2.1, 2.2), LOSS, False, '2.134 ± 0.050'),
  (Cell(6113280), COUNT, False, '6,113,280'),
  (Cell(100), SHARE, False, '100'),
  (Cell(7.9434), SHARE, False, '7.94'),
  (Cell(0.018), SHARE, False, '0.018'),
  (Cell(0.00976), SHARE, False, '0.00976'),
  (None, SCORE, True, '-'),
]


@pytest.mark.parametrize(('cell', 'column', 'signed', 'text'), NUMBERS)
def test_a_number_has_one_form(cell, column, signed, text):
  assert table_render.format_number(cell, column, signed=signed) == text


TABLE = Table(
  columns=(
    COUNT,
    LOSS,
    SCORE,
  ),
  lines=(
    Line('majority', '', 'majority', cells={'a': Cell(99.0)}),
    Line('run', 'lora(rank=4)', cells={'l': Cell(2.5), 'a': Cell(50.04)}),
    Line('difference', '', 'less', cells={'l': Cell(-0.5), 'a': Cell(70.0)}),
    Line(
      'run', 'm_x(y=1)', 'paper | 5 %', '1',
      {'n': Cell(1234567), 'l': Cell(2.25, 2.0, 2.5), 'a': Cell(50.01)},
    ),
  ),
  notes=('[1] a_b ± 5 % of `x_y`.',),
  title='A & B',
  decimals=1,
)  # fmt: skip


def test_markdown_is_aligned_and_the_best_of_runs_is_bold():
  # Both print 50.0: they share the best. Of losses the lowest is.
  assert table_render.markdown(TABLE) == (
    '**A & B**\n'
    '\n'
    '| method                      | parameters |              loss |'
    '      a_b |\n'
    '| --------------------------- | ---------: | ----------------: |'
    ' -------: |\n'
    '| majority                    |          - |                 - |'
    '     99.0 |\n'
    '| `lora(rank=4)`              |          - |             2.500 |'
    ' **50.0** |\n'
    '| less                        |          - |            -0.500 |'
    '    +70.0 |\n'
    '| `m_x(y=1)` paper \\| 5 % [1] |  1,234,567 | **2.250 ± 0.250** |'
    ' **50.0** |\n'
    '\n'
    '- [1] a_b ± 5 % of `x_y`.\n'
  )


def test_one_run_alone_is_not_the_best():
  one = Table(TABLE.columns, TABLE.lines[:2])
  assert table_render.bold_cells(one) == set()


def test_latex_has_rules_and_escapes_what_is_special():
  text = table_render.latex(TABLE)
  lines = text.splitlines()
  for name in ('toprule', 'midrule', 'bottomrule'):
    assert lines.count(f'\\{name}') == 1
  assert r'\begin{tabular}{lrrr}' in lines
  assert r'\caption{A \& B}' in lines
  assert r'method & parameters & loss & a\_b \\' in lines
  assert (
    r'\texttt{m\_x(y=1)} paper | 5 \% [1] & 1,234,567 & '
    r'\textbf{2.250 $\pm$ 0.250} & \textbf{50.0} \\'
  ) in lines
  assert r'less & - & $-$0.500 & +70.0 \\' in lines
  assert r'{\footnotesize [1] a\_b $\pm$ 5 \% of x\_y.\par}' in lines
  # As many columns in every line of the body.
  body = lines[lines.index(r'\midrule') + 1 : lines.index(r'\bottomrule')]
  assert [line.count(' & ') for line in body] == [3, 3, 3, 3]


def test_escapes_leave_nothing_special():
  said = table_render.escape_latex('a_b%c$d#e{f}g~h^i\\j & 5-fold -3 ± 4 × 2')
  assert said == (
    r'a\_b\%c\$d\#e\{f\}g\textasciitilde{}h\textasciicircum{}i'
    r'\textbackslash{}j \& 5-fold $-$3 $\pm$ 4 $\times$ 2'
  )
