# SPDX-License-Identifier: Apache-2.0
"""Summarizes the work directory of a training run.

  python summarize.py WORKDIR

Imports moepeft, but neither JAX nor NumPy, so that it starts fast.
"""

import sys
from pathlib import Path

try:
  from moepeft.runs import diagnosis
except ModuleNotFoundError:
  # moepeft is not installed; this file is inside the package.
  sys.path.append(str(Path(__file__).resolve().parents[5]))
  from moepeft.runs import diagnosis


def main(argv: list[str]) -> str:
  """Returns the summary.

  Raises:
    ValueError: there is no run.
  """
  if len(argv) != 1:
    raise ValueError('expected one argument, the work directory of a run')
  folder = Path(argv[0]).expanduser()
  if not folder.is_dir():
    raise ValueError(f'there is no directory {str(folder)!r}')
  return diagnosis.summary(folder)


if __name__ == '__main__':
  try:
    print(main(sys.argv[1:]))
  except ValueError as e:
    sys.exit(f'error: {e}')
