# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.tables RUN...: compares runs with each other and the paper.

A RUN is a work directory of moepeft.train with results of moepeft.evaluate, or
that of a sweep, which stands for its chosen runs. The command prints Markdown;
--output=PREFIX writes PREFIX.md, .tex and .png.
"""

import os
import re

from absl import flags

from moepeft.config import command_line
from moepeft.core import files, terminal
from moepeft.evaluation.tables import compare, forest_plot
from moepeft.evaluation.tables import render as table_render
from moepeft.evaluation.tables.render import Table
from moepeft.sweeps import results as sweep_results


def write(table: Table, prefix: str) -> list[str]:
  """Writes PREFIX.md, PREFIX.tex and PREFIX.png; returns their paths."""
  paths = [f'{prefix}{end}' for end in ('.md', '.tex', '.png')]
  os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
  texts = (table_render.markdown(table), table_render.latex(table))
  for path, text in zip(paths, texts, strict=False):
    files.write_text(path, text)
  forest_plot.draw(table, paths[-1])
  return paths


def put_into(path: str, name: str, text: str) -> None:
  """Replaces the text between a document's markers of a table.

  The markers are the lines `<!-- table: NAME -->` and `<!-- /table -->`.

  Raises:
    ValueError: the document or its markers are missing, or exist twice.
  """
  new = replaced(path, name, text)
  files.write_text(path, new)


def replaced(path: str, name: str, text: str) -> str:
  """The document with the replaced table; raises as `put_into`."""
  if not os.path.exists(path):
    raise ValueError(f'--into={path}: there is no such document')
  document = files.read_text(path)
  start, end = f'<!-- table: {name} -->', '<!-- /table -->'
  # The content must not contain the start of another table.
  content = r'((?!<!-- table: ).)*?'
  pattern = f'^{re.escape(start)}\n{content}^{re.escape(end)}$'
  matches = re.findall(pattern, document, re.S | re.M)
  if not name or len(matches) != 1:
    raise ValueError(
      f'--into={path}: expected one line {start!r}, with the --name of the '
      f'table, and the line {end!r} after it; found {len(matches)} such pairs'
    )
  return re.sub(
    pattern, lambda _: f'{start}\n{text}{end}', document, flags=re.S | re.M
  )


def main(argv) -> None:
  if bool(_INTO.value) != bool(_NAME.value):
    raise ValueError('--into=DOCUMENT and --name=TABLE go together; give both')
  if _OUTPUT.value and not os.path.basename(_OUTPUT.value):
    raise ValueError(
      f'--output={_OUTPUT.value} is a directory; expected a prefix of file '
      f'names, such as {_OUTPUT.value}table'
    )
  for flag in (_ROUTING, _COST):
    if flag.value and not argv[1:]:
      raise ValueError(
        f'--{flag.name} is for runs; name their work directories'
      )
  runs = [
    run
    for path in argv[1:]
    for run in sweep_results.runs_to_compare(os.path.expanduser(path))
  ]
  table = compare.table(
    runs,
    _PAPER.value,
    _BASELINE.value,
    _TITLE.value,
    _ROUTING.value,
    _COST.value,
  )
  text = table_render.markdown(table)
  if _INTO.value:
    # Checked before anything is written.
    replaced(os.path.expanduser(_INTO.value), _NAME.value, text)
  terminal.show(text, end='')
  if _OUTPUT.value:
    for path in write(table, os.path.expanduser(_OUTPUT.value)):
      print(f'wrote {path}')
  if _INTO.value:
    put_into(os.path.expanduser(_INTO.value), _NAME.value, text)
    print(f'wrote the table {_NAME.value} into {_INTO.value}')


if __name__ == '__main__':
  _PAPER = flags.DEFINE_string(
    'paper',
    '',
    "The paper's table beside the runs, or alone: t5_large, t5_xl or t5_xxl.",
  )
  _BASELINE = flags.DEFINE_string(
    'baseline', '', 'A method or a RUN: the others are compared with it.'
  )
  _ROUTING = flags.DEFINE_bool(
    'routing', False, 'Add columns about the final routers.'
  )
  _COST = flags.DEFINE_bool(
    'cost', False, 'Add columns of FLOPs, step time and memory.'
  )
  _TITLE = flags.DEFINE_string('title', '', 'The title of the table.')
  _OUTPUT = flags.DEFINE_string(
    'output', '', 'A prefix of paths; .md, .tex and .png are written.'
  )
  _INTO = flags.DEFINE_string(
    'into', '', 'A document with the markers of the table --name.'
  )
  _NAME = flags.DEFINE_string(
    'name', '', 'The name of the table in that document.'
  )
  command_line.run(main, takes_arguments=True)
