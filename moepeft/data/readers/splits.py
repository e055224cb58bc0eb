# SPDX-License-Identifier: Apache-2.0
"""Finds the splits of a directory's files by their names, as `datasets` does.

'train-00000.parquet' and 'data/test/a.json' name their splits. If no file names
a split other than 'train', all files are the split 'train'.
"""

import os
import re

from moepeft.core import files
from moepeft.data import fingerprint
from moepeft.data.example import BadRows

_SPLIT_NAMES = {
  **dict.fromkeys(('train', 'training'), 'train'),
  **dict.fromkeys(('test', 'testing', 'eval', 'evaluation'), 'test'),
  **dict.fromkeys(('validation', 'valid', 'val', 'dev'), 'validation'),
}
_BOUND = r'(-?\d{1,15}%?)?'
_SPLIT_PATTERN = re.compile(rf'(\w+)(?:\[{_BOUND}:{_BOUND}\])?')
# Files that save_to_disk writes for one split, and for several.
_SAVED_FILES = ('state.json', 'dataset_dict.json')
# Bytes of a README that are searched for its list of files.
_README_BYTES = 1 << 16


def split_error(path: str, split: str, reason: str) -> ValueError:
  return ValueError(
    f'the split {split!r} of {path!r} cannot be read ({reason}); check '
    'config.data.path and config.data.split'
  )


def split_name(split: str) -> str:
  """'train[:10%]' -> 'train'."""
  return split.partition('[')[0]


def split_slice(path: str, split: str, count: int) -> slice:
  """The slice of 'train[10:20]' or 'train[:10%]' among `count` rows.

  Raises:
    ValueError: the split has another syntax.
  """
  match = _SPLIT_PATTERN.fullmatch(split)
  if match is None:
    raise split_error(path, split, "expected a name, or 'train[:10%]'")
  return slice(*(_bound(text, count) for text in match.groups()[1:]))


def _bound(text: str | None, count: int) -> int | None:
  if text is None:
    return None
  if not text.endswith('%'):
    return int(text)
  # To the nearest row, as `datasets` rounds.
  return round(int(text[:-1]) * count / 100)


def is_saved_dataset(folder: str) -> bool:
  """Whether a directory was written by save_to_disk."""
  return any(
    os.path.isfile(os.path.join(folder, name)) for name in _SAVED_FILES
  )


def lists_its_files(folder: str) -> bool:
  """Whether save_to_disk or the README of a directory lists its files."""
  readme = os.path.join(folder, 'README.md')
  if is_saved_dataset(folder) or not os.path.isfile(readme):
    return is_saved_dataset(folder)
  with files.open_file(readme) as stream:
    head = stream.read(_README_BYTES).decode(errors='replace')
  return head.startswith('---') and 'data_files:' in head.split('\n---')[0]


def split_files(path: str, folder: str, split: str, bad: BadRows) -> list[str]:
  """The files of a split.

  Args:
    path: the directory as the user gave it, for messages.
    folder: the directory.
    bad: records the files that are left out.

  Raises:
    ValueError: there are no files of the split.
  """
  listing = fingerprint.list_directory(
    folder, fingerprint.TABLE_FILES.endings, deep=True
  )
  by_split: dict[str, list[str]] = {}
  for file in listing.files:
    name_parts = re.split(r'[-_./\s\d]+', os.path.relpath(file, folder).lower())
    names = [_SPLIT_NAMES[part] for part in name_parts if part in _SPLIT_NAMES]
    by_split.setdefault(names[-1] if names else '', []).append(file)
  if listing.files and set(by_split) <= {'train', ''}:
    by_split = {'train': list(listing.files)}
  without_split = by_split.pop('', [])
  bad.left_out += listing.left_out
  bad.left_out += [
    f'{os.path.relpath(file, folder)} (no split)' for file in without_split
  ]
  if split_name(split) not in by_split:
    names = ', '.join(by_split) or 'none, and no data file'
    raise split_error(path, split, f'it has: {names}')
  return by_split[split_name(split)]
