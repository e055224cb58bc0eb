# SPDX-License-Identifier: Apache-2.0
"""Checks of packages that only an extra of ours brings."""

import importlib.util
import os
import sys
from collections.abc import Sequence


def require(module: str, extra: str, packages: Sequence[str]) -> None:
  """Checks that packages can be imported.

  Args:
    module: the module of ours that needs them.
    extra: brings them, by pip install 'moepeft[extra]'.

  Raises:
    ImportError: one is not installed.
    SystemExit: the same where `python -m` is importing the module, so that a
      command ends with the sentence instead of a traceback.
  """
  for name in packages:
    if importlib.util.find_spec(name) is None:
      sentence = (
        f"{module} needs the package {name}: pip install 'moepeft[{extra}]'"
      )
      # `python -m` sets '-m' while it looks a module up, then the file's path.
      file = os.path.join(*module.split('.'), '__main__.py')
      if sys.argv[0] == '-m' or sys.argv[0].endswith(file):
        raise SystemExit(sentence)
      raise ImportError(sentence)
