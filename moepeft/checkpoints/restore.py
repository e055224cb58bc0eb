# SPDX-License-Identifier: Apache-2.0
"""The trained arrays of a run, read from its work directory."""

from typing import Any

from moepeft.checkpoints.manager import Checkpoints
from moepeft.core.types import Tree
from moepeft.runs.run import Run


def restore_trained(
  workdir: str, selection: str = ''
) -> tuple[Tree, dict[str, Any]]:
  """(what a run trained, its metadata): 'peft', or 'params' of a full run.

  Args:
    selection: see `Checkpoints.restore_trainable`.

  Raises:
    ValueError: no run is there, or its checkpoint is damaged.
  """
  if not Run(workdir).has_checkpoints_dir:
    raise ValueError(f'{workdir!r} is no work directory of a run')
  return Checkpoints(workdir, keep=None).restore_trainable(selection)


def restore_adapter(
  workdir: str, selection: str = ''
) -> tuple[Tree, dict[str, Any]]:
  """(the trained 'peft' tree, its metadata) of a run.

  Raises:
    ValueError: as `restore_trained`, or the run trained the base itself.
  """
  tree, read = restore_trained(workdir, selection)
  if read['trainable'] != 'peft':
    raise ValueError(
      f'the run in {workdir!r} trained the base itself ({read["method"]}) and '
      'has no adapter; make it a base model with python -m moepeft.convert '
      '--workdir=RUN --output=DIR, and name that'
    )
  return tree, read
