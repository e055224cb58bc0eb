# SPDX-License-Identifier: Apache-2.0
"""Names of moepeft that scripts use, which no test runs, exist."""

import ast
import importlib
import pathlib
import types

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_SCRIPTS = sorted(
  path
  for name in ('benchmarks', 'scripts')
  for path in _ROOT.glob(f'{name}/*.py')
)


def imported(tree):
  """{name: object} of what a script imports from moepeft."""
  names = {}
  for node in ast.walk(tree):
    if not isinstance(node, ast.ImportFrom):
      continue
    if (node.module or '').partition('.')[0] != 'moepeft':
      continue
    module = importlib.import_module(node.module)
    for alias in node.names:
      if not hasattr(module, alias.name):
        importlib.import_module(f'{node.module}.{alias.name}')
      names[alias.asname or alias.name] = getattr(module, alias.name)
  return names


@pytest.mark.parametrize('path', _SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_takes_from_modules_exists(path):
  tree = ast.parse(path.read_text(encoding='utf-8'))
  names = imported(tree)
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      module = names.get(node.value.id)
      if isinstance(module, types.ModuleType):
        assert hasattr(module, node.attr), ast.unparse(node)
