# SPDX-License-Identifier: Apache-2.0
"""Prints what a run's work directory shows, in a few lines.

  python summarize.py WORKDIR

Needs moepeft beside it, where it ships, but neither JAX nor NumPy, so that it
starts at once.
"""

import sys
from pathlib import Path

try:
  from moepeft.runs import diagnosis
except ModuleNotFoundError:
  # A Python that moepeft is not installed for: the script lies within it.
  sys.path.append(str(Path(__file__).resolve().parents[5]))
  from moepeft.runs import diagnosis


def main(argv: list[str]) -> str:
  """The summary.

  Raises:
    ValueError: there is no run, a sentence.
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
