# SPDX-License-Identifier: Apache-2.0
"""Rows of an evaluation on their way, so that a kill loses few of them."""

import dataclasses
import os
from collections.abc import Iterable

from moepeft.core import jsonl_log as rows_lib
from moepeft.evaluation import scores as scoring
from moepeft.evaluation.eval_sets import Prompt
from moepeft.evaluation.scores import About, Row


class Unfinished:
  """A file that gets each row once it is measured, and gives it back later."""

  def __init__(self, path: str, about: About):
    """Rows of another evaluation than `about`'s are passed over.

    Args:
      path: of the file; '' for none.

    Raises:
      ValueError: a line but the last, which a kill may have torn, is no row.
    """
    self.path = path
    self._file = None
    self._found: dict[tuple[str, str, str], Row] = {}
    if not path:
      return
    # This cuts a torn line off.
    folder, name = os.path.split(os.path.abspath(path))
    self._file = rows_lib.Rows(folder, name, about.step)
    own = {key: value for key, value in vars(about).items() if key != 'run'}
    for row in scoring.read(path) if os.path.getsize(path) else ():
      if own.items() <= vars(row).items():
        # The work directory may be spelt in another way.
        self._keep(dataclasses.replace(row, run=about.run))

  def get(self, prompt: Prompt, measure: str) -> Row | None:
    """The row of a prompt, if it is there and of the same examples."""
    row = self._found.get((prompt.task, prompt.name, measure))
    if row is None or row.examples + row.left_out != len(prompt.examples):
      return None
    return row if {*row.idx} <= {e.idx for e in prompt.examples} else None

  def add(self, rows: Iterable[Row]) -> None:
    """Keeps rows, in the file too.

    Raises:
      OSError: the disk is full.
    """
    for row in rows:
      self._keep(row)
      if self._file is not None:
        self._file.write(vars(row))

  def close(self) -> None:
    if self._file is not None:
      self._file.close()

  def _keep(self, row: Row) -> None:
    self._found[row.task, row.prompt, row.measure] = row
