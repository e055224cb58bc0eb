# SPDX-License-Identifier: Apache-2.0
"""Modules of the user that register entries, named by config.imports."""

import importlib
import os
import sys

from moepeft.core.ranges import shortened


def names(text: str) -> list[str]:
  """'my_module, other.module' -> ['my_module', 'other.module'].

  Raises:
    ValueError: a name is not that of a module, 'my_module.py' for example.
  """
  modules = [part.strip() for part in text.split(',') if part.strip()]
  for name in modules:
    if name.endswith('.py') or not all(
      part.isidentifier() for part in name.split('.')
    ):
      example = name.removesuffix('.py').replace('/', '.')
      raise ValueError(
        '--imports takes names of Python modules, as an import statement '
        f'does; got {shortened(name)}'
        + (f', write {example}' if name.endswith('.py') else '')
      )
  return modules


def import_modules(text: str, search_current: bool = False) -> None:
  """Imports modules, which register their entries as they are imported.

  Args:
    text: their names with commas, as in config.imports.
    search_current: whether to look in the current directory too, as
      `python -m` does and a console script does not. For names that the user
      has typed, not for those of a run's files.

  Raises:
    ValueError: a module is not there or raises an error.
  """
  modules = names(text)
  if modules and search_current and os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  for name in modules:
    try:
      importlib.import_module(name)
    except Exception as e:
      raise ValueError(
        f'the module {name!r} of --imports cannot be imported '
        f'({type(e).__name__}: {e}); start the command in the folder of '
        f'{name.split(".")[0]}, or put that folder on PYTHONPATH'
      ) from e
