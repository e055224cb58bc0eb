# SPDX-License-Identifier: Apache-2.0
"""Finds T5X checkpoints by the names of their files."""

import re
from pathlib import Path

from absl import logging

from moepeft.models.weight_mapping import CheckpointError

INDEX, ORBAX_METADATA = 'checkpoint', '_METADATA'
STEP_NAME = re.compile(r'checkpoint_(\d+)')
# Subdirectories: T5X's state, and the item of Orbax's checkpoint managers.
_ITEMS = ('', 'state', 'default')


def holds(path: str) -> bool:
  """Whether a path looks like a checkpoint, or like a directory of them."""
  folder = Path(path)
  return bool(_index(folder) or _children(folder))


def find_index(path: str) -> Path:
  """The index of a checkpoint, or of the latest one inside `path`.

  Raises:
    CheckpointError: there is no checkpoint.
  """
  folder = Path(path)
  index = _index(folder)
  if index:
    return index
  steps = _children(folder)
  if not steps:
    raise CheckpointError(
      f'{path} is no T5X checkpoint: expected a directory checkpoint_<step> '
      f'with a file {INDEX!r}, an Orbax directory with {ORBAX_METADATA!r}, a '
      'single msgpack file checkpoint_<step>, or a directory that contains one '
      'of these'
    )
  latest = steps[max(steps)]
  logging.info('%s: reading the latest checkpoint, %s', path, latest)
  return latest


def _index(path: Path) -> Path | None:
  """The index of a checkpoint; None if the path is no checkpoint."""
  if not path.is_dir():
    has_name = path.name == INDEX or STEP_NAME.search(path.name)
    return path if path.exists() and has_name else None
  for item in _ITEMS:
    for name in (INDEX, ORBAX_METADATA):
      if (path / item / name).exists() and not (path / item / name).is_dir():
        return path / item / name
  return None


def _children(folder: Path) -> dict[int, Path]:
  """{step: index} of the checkpoints in a directory."""
  indices = {}
  for child in folder.glob('checkpoint_*'):
    match = STEP_NAME.fullmatch(child.name)
    if match and (index := _index(child)):
      indices[int(match[1])] = index
  return indices
