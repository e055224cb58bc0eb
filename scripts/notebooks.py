# SPDX-License-Identifier: Apache-2.0
"""The notebooks of the course, from one source for two languages.

python scripts/notebooks.py [NAME ...] [--text_only]

notebooks/source/NN_name.py has the cells in jupytext's percent format. A text
cell has a language, `# %% [markdown] lang="en"` or `lang="zh"`; code cells are
common; cells with `tags=["solution"]` are the solutions of the exercises. This
command runs the code from the first cell to the last, solutions included, and
writes notebooks/NN_name.ipynb and .zh.ipynb, and both of notebooks/solutions/.
In a text, {{moepeft.nn.attention.attend}} becomes a link to the line of the
definition, in a module or in a package's __init__.py. --text_only keeps the
outputs of the files that are there: enough after a change of texts or of line
numbers.
"""

import argparse
import ast
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat
from nbformat import NotebookNode, v4

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'notebooks'
SOURCE = FOLDER / 'source'
# {language: the end of its files' names}
ENDINGS = {'en': '.ipynb', 'zh': '.zh.ipynb'}
_KERNEL = {
  'name': 'python3',
  'display_name': 'Python 3',
  'language': 'python',
}
_SYMBOL = re.compile(r'\{\{([\w.]+)\}\}')
_SECONDS_A_CELL = 900
# XLA's remarks on slow compilation, which a busy machine has, are no output.
_QUIET = {'TF_CPP_MIN_LOG_LEVEL': '3'}


def names() -> list[str]:
  """The names of all notebooks of the course, in order."""
  return sorted(path.stem for path in SOURCE.glob('*.py'))


def read_cells(name: str) -> list[NotebookNode]:
  """The cells of a source, each with an id of its place."""
  path = SOURCE / f'{name}.py'
  cells = jupytext.read(path, fmt='py:percent').cells
  # The licence, which stands before the first cell.
  cells = [c for c in cells if not c.source.startswith('# SPDX-')]
  for i, cell in enumerate(cells):
    cell.id = f'cell-{i}'
    is_text = cell.cell_type == 'markdown'
    if is_text and cell.metadata.get('lang') not in ENDINGS:
      raise ValueError(
        f'{path}: give the text cell {cell.source[:40]!r} lang="en" or "zh"'
      )
  return cells


def execute(name: str, folder: str | Path) -> dict[str, list[NotebookNode]]:
  """Runs the code of a source in a folder; returns the outputs by cell id."""
  code = [c for c in read_cells(name) if c.cell_type == 'code']
  notebook = v4.new_notebook(cells=code, metadata={'kernelspec': _KERNEL})
  nbclient.NotebookClient(
    notebook,
    timeout=_SECONDS_A_CELL,
    kernel_name='python3',
    startup_timeout=_SECONDS_A_CELL,
    resources={'metadata': {'path': str(folder)}},
  ).execute(env=os.environ | _QUIET)
  return {cell.id: cell.outputs for cell in notebook.cells}


def pages(
  name: str, outputs: Mapping[str, list[NotebookNode]]
) -> dict[Path, NotebookNode]:
  """{path: notebook} of a source: two languages, with solutions beside."""
  cells = read_cells(name)
  result = {}
  for language, ending in ENDINGS.items():
    for is_solution in (False, True):
      above = '../' if is_solution else ''
      chosen = [
        _page_cell(cell, outputs, '../' + above)
        for cell in cells
        if cell.metadata.get('lang', language) == language
        and ('solution' in cell.metadata.get('tags', ())) == is_solution
      ]
      if is_solution:
        # The names that the solutions use.
        run = v4.new_code_cell(f'%run {above}{name}{ending}', id='run')
        chosen.insert(1, run)
      path = FOLDER / ('solutions' if is_solution else '') / (name + ending)
      result[path] = v4.new_notebook(
        cells=chosen, metadata={'kernelspec': _KERNEL}
      )
  return result


def write_text(notebook: NotebookNode) -> str:
  """A notebook as its file has it."""
  return nbformat.writes(notebook, indent=1) + '\n'


def outputs_of_files(name: str) -> dict[str, list[NotebookNode]]:
  """The outputs of the files that are there, by cell id."""
  result = {}
  for folder in (FOLDER, FOLDER / 'solutions'):
    notebook = nbformat.read(folder / (name + ENDINGS['en']), as_version=4)
    result |= {c.id: c.outputs for c in notebook.cells if 'outputs' in c}
  return result


def link(symbol: str, above: str) -> str:
  """A link in Markdown to the line where a name of the package is defined.

  Raises:
    ValueError: there is no such definition.
  """
  parts = symbol.split('.')
  for i in range(len(parts), 0, -1):
    module, name = '/'.join(parts[:i]), '.'.join(parts[i:])
    for place in (f'{module}.py', f'{module}/__init__.py'):
      line = _line(ROOT / place, parts[i:])
      if line:
        text = f'`{name}`, {place}:{line}' if name else f'`{place}`'
        return f'[{text}]({above}{place}#L{line})'
  raise ValueError(f'{{{{{symbol}}}}}: nothing of this name is defined')


def _line(path: Path, parts: Sequence[str]) -> int | None:
  """The line of a class, a function or a constant, also within a class.

  None where the file or the name is not there.
  """
  if not path.is_file():
    return None
  body: list[Any] = ast.parse(path.read_text(encoding='utf-8')).body
  line = 1
  for part in parts:
    for node in body:
      targets = getattr(node, 'targets', [getattr(node, 'target', None)])
      if part in (
        getattr(node, 'name', None),
        *(getattr(target, 'id', None) for target in targets),
      ):
        line, body = node.lineno, getattr(node, 'body', [])
        break
    else:
      return None
  return line


def _page_cell(
  cell: NotebookNode, outputs: Mapping[str, list[NotebookNode]], above: str
) -> NotebookNode:
  if cell.cell_type == 'markdown':
    text = _SYMBOL.sub(lambda match: link(match[1], above), cell.source)
    return v4.new_markdown_cell(text, id=cell.id)
  return v4.new_code_cell(
    cell.source, id=cell.id, outputs=outputs.get(cell.id, [])
  )


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('names', nargs='*', default=[], metavar='NAME')
  parser.add_argument('--text_only', action='store_true')
  flags = parser.parse_args(argv)
  for name in flags.names or names():
    if flags.text_only:
      outputs = outputs_of_files(name)
    else:
      # A wrong link or text cell raises here, before minutes of running.
      pages(name, {})
      with tempfile.TemporaryDirectory() as folder:
        outputs = execute(name, folder)
    for path, notebook in pages(name, outputs).items():
      path.parent.mkdir(exist_ok=True)
      path.write_text(write_text(notebook), encoding='utf-8')
    print(name, flush=True)


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  main()
