# SPDX-License-Identifier: Apache-2.0
"""Restores the trained arrays of a run from its work directory."""

from typing import Any

from moepeft.checkpoints.manager import Checkpoints
from moepeft.core.types import Tree
from moepeft.runs.run import Run


def restore_trained(
  workdir: str, selection: str = ''
) -> tuple[Tree, dict[str, Any]]:
  """(trained collection, metadata); 'params' for full fine-tuning, else 'peft'.

  Args:
    selection: see `Checkpoints.restore_trainable`.

  Raises:
    ValueError: there is no run, or its checkpoint is damaged.
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
  tree, metadata = restore_trained(workdir, selection)
  if metadata['trainable'] != 'peft':
    raise ValueError(
      f'the run in {workdir!r} trained the base itself ({metadata["method"]}) '
      'and has no adapter; export it as a base model with python -m '
      'moepeft.convert --workdir=RUN --output=DIR, and name that'
    )
  return tree, metadata
