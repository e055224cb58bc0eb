# SPDX-License-Identifier: Apache-2.0
"""Names carry type and role, and docstrings open with their subject.

PENDING lists the folders that are not written so yet; it only shrinks.
"""

import ast
import pathlib
import re
import sys

import pytest

from scripts import structure

# Pronouns, participles and other words that say nothing of a value.
FORBIDDEN = frozenset(
  'found own said told kept some other others one ones thing things '
  'what which how whose taken given asked wanted made seen held laid called '
  'known meant heard gone say tell says tells mine theirs '
  'ours its it that this those these such both either neither nobody nothing '
  'something everything anything everyone'.split()
)
OPENINGS = re.compile(r'(What|Which|How|Of|Who|Whose|Where|When|Why|That)\b')
PENDING = frozenset(
  (
    'tests/benchmarks',
    'tests/checkpoints',
    'tests/contracts',
    'tests/core',
    'tests/data',
    'tests/evaluation',
    'tests/fuzz',
    'tests/inference',
    'tests/models',
    'tests/moe',
    'tests/nn',
    'tests/peft',
    'tests/reference',
    'tests/training',
  )
)


def names(tree):
  """(line, name) of everything that a module binds: variables, arguments,
  functions, classes, attributes of classes and of self."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      yield node.lineno, node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
      yield node.lineno, node.attr
    elif isinstance(node, ast.arg):
      yield node.lineno, node.arg
    elif isinstance(
      node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    ):
      yield node.lineno, node.name
    elif isinstance(node, ast.alias) and node.asname:
      yield node.lineno, node.asname


def docstrings(tree):
  """(line, text) of a module's docstrings."""
  kinds = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  for node in ast.walk(tree):
    if isinstance(node, kinds) and (text := ast.get_docstring(node)):
      yield getattr(node, 'lineno', 1), text


def findings(folder: pathlib.Path):
  """Lines of a folder's files that break one of the two rules."""
  for path in sorted(folder.rglob('*.py')):
    tree = ast.parse(path.read_text())
    for line, name in names(tree):
      if name.strip('_').lower() in FORBIDDEN:
        yield f'{path}:{line}: the name {name}'
    for line, text in docstrings(tree):
      if OPENINGS.match(text):
        yield f'{path}:{line}: a docstring that opens with {text.split()[0]!r}'


def folders():
  tops = [path for path in structure.PACKAGE.iterdir() if path.is_dir()]
  tests = [path for path in (structure.ROOT / 'tests').iterdir()]
  for path in sorted(tops + [p for p in tests if p.is_dir()]):
    name = path.relative_to(structure.ROOT).as_posix()
    if name not in PENDING and path.name != '__pycache__':
      yield name


@pytest.mark.parametrize('folder', folders())
def test_names_and_docstrings(folder):
  assert list(findings(structure.ROOT / folder)) == []


def test_pending_folders_have_findings():
  clean = [f for f in PENDING if not list(findings(structure.ROOT / f))]
  assert clean == [], 'take them out of PENDING'


def test_the_check_sees_both_faults(tmp_path):
  file = tmp_path / 'module.py'
  file.write_text('"""What it does."""\nfound = 1\n\ndef f(own): pass\n')
  assert [line.split(': ', 1)[1] for line in findings(tmp_path)] == [
    'the name found',
    'the name own',
    "a docstring that opens with 'What'",
  ]


if __name__ == '__main__':
  # python -m tests.test_language FOLDER ...: prints what is left.
  for name in sys.argv[1:]:
    print(*findings(pathlib.Path(name)), sep='\n')
