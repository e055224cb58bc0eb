# SPDX-License-Identifier: Apache-2.0
"""Splits of a directory of files, told by their names as `datasets` tells them.

'train-00000.parquet' and 'data/test/a.json' name their splits; where the files
name none but 'train', all of them are that.
"""

import os
import re

from moepeft.core import files
from moepeft.data import fingerprint
from moepeft.data.example import BadRows

_WORDS = {
  **dict.fromkeys(('train', 'training'), 'train'),
  **dict.fromkeys(('test', 'testing', 'eval', 'evaluation'), 'test'),
  **dict.fromkeys(('validation', 'valid', 'val', 'dev'), 'validation'),
}
_BOUND = r'(-?\d{1,15}%?)?'
_FORM = re.compile(rf'(\w+)(?:\[{_BOUND}:{_BOUND}\])?')
# What save_to_disk writes for one split, and for several.
_SAVED = ('state.json', 'dataset_dict.json')
# Bytes of a README in which its list of files is looked for.
_HEAD = 1 << 16


def split_error(path: str, split: str, reason: str) -> ValueError:
  return ValueError(
    f'the split {split!r} of {path!r} cannot be read ({reason}); check '
    'config.data.path and config.data.split'
  )


def split_name(split: str) -> str:
  """'train' of 'train[:10%]'."""
  return split.partition('[')[0]


def split_slice(path: str, split: str, count: int) -> slice:
  """The rows of 'train[10:20]' or 'train[:10%]' among so many.

  Raises:
    ValueError: it is not of that form.
  """
  form = _FORM.fullmatch(split)
  if form is None:
    raise split_error(path, split, "expected a name, or 'train[:10%]'")
  return slice(*(_bound(text, count) for text in form.groups()[1:]))


def _bound(text: str | None, count: int) -> int | None:
  if text is None:
    return None
  if not text.endswith('%'):
    return int(text)
  # To the nearest row, as `datasets` rounds.
  return round(int(text[:-1]) * count / 100)


def is_saved_dataset(folder: str) -> bool:
  """Whether save_to_disk wrote a directory."""
  return any(os.path.isfile(os.path.join(folder, name)) for name in _SAVED)


def lists_its_files(folder: str) -> bool:
  """Whether save_to_disk wrote a directory, or its README names its files."""
  readme = os.path.join(folder, 'README.md')
  if is_saved_dataset(folder) or not os.path.isfile(readme):
    return is_saved_dataset(folder)
  with files.open_file(readme) as stream:
    head = stream.read(_HEAD).decode(errors='replace')
  return head.startswith('---') and 'data_files:' in head.split('\n---')[0]


def split_files(path: str, folder: str, split: str, bad: BadRows) -> list[str]:
  """The files of a split.

  Args:
    path: of the directory, for messages; folder: where it is.
    bad: told of what is left out.

  Raises:
    ValueError: there are none.
  """
  listing = fingerprint.list_directory(
    folder, fingerprint.TABLE_FILES.endings, deep=True
  )
  by_split: dict[str, list[str]] = {}
  for file in listing.files:
    name_parts = re.split(r'[-_./\s\d]+', os.path.relpath(file, folder).lower())
    named = [_WORDS[word] for word in name_parts if word in _WORDS]
    by_split.setdefault(named[-1] if named else '', []).append(file)
  if listing.files and set(by_split) <= {'train', ''}:
    by_split = {'train': list(listing.files)}
  rest = by_split.pop('', [])
  bad.left_out += listing.left_out
  bad.left_out += [
    f'{os.path.relpath(file, folder)} (no split)' for file in rest
  ]
  if split_name(split) not in by_split:
    names = ', '.join(by_split) or 'none, and no file of data'
    raise split_error(path, split, f'there: {names}')
  return by_split[split_name(split)]
