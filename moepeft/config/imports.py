# SPDX-License-Identifier: Apache-2.0
"""Imports the user's modules in config.imports, which register entries."""

import importlib
import os
import sys

from moepeft.core.ranges import short_repr


def module_names(text: str) -> list[str]:
  """'my_module, other.module' -> ['my_module', 'other.module'].

  Raises:
    ValueError: a name is not a module's, for example 'my_module.py'.
  """
  modules = [part.strip() for part in text.split(',') if part.strip()]
  for name in modules:
    if name.endswith('.py') or not all(
      part.isidentifier() for part in name.split('.')
    ):
      example = name.removesuffix('.py').replace('/', '.')
      raise ValueError(
        '--imports takes names of Python modules, as an import statement '
        f'does; got {short_repr(name)}'
        + (f', write {example}' if name.endswith('.py') else '')
      )
  return modules


def import_modules(text: str, search_current: bool = False) -> None:
  """Imports modules, which register their entries on import.

  Args:
    text: module names separated by commas, as in config.imports.
    search_current: whether to search the current directory, too, as `python
      -m` does and a console script does not. Only for names that the user
      typed, not for names from a run's files.

  Raises:
    ValueError: a module does not exist or raises an error.
  """
  modules = module_names(text)
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
