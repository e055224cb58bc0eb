# SPDX-License-Identifier: Apache-2.0
"""Checks that the packages of an extra are installed."""

import importlib.util
import os
import sys
from collections.abc import Sequence


def require(module: str, extra: str, packages: Sequence[str]) -> None:
  """Checks that packages can be imported.

  Args:
    module: the module of moepeft that needs the packages.
    extra: the extra that installs them, by pip install 'moepeft[extra]'.

  Raises:
    ImportError: a package is not installed.
    SystemExit: instead, if `python -m` imports the module, so that a command
      ends with the message and without a traceback.
  """
  for name in packages:
    if importlib.util.find_spec(name) is None:
      message = (
        f"{module} needs the package {name}: pip install 'moepeft[{extra}]'"
      )
      # `python -m` sets '-m' while it finds the module, then the file's path.
      file = os.path.join(*module.split('.'), '__main__.py')
      if sys.argv[0] == '-m' or sys.argv[0].endswith(file):
        raise SystemExit(message)
      raise ImportError(message)
