# SPDX-License-Identifier: Apache-2.0
"""Files that users name: their text, and hashes to know them again later."""

import hashlib
import os
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from moepeft.core.files import local_path

# Sources that are read from local files, each whole.
_SOURCES = ('jsonl', 'datasets', 'text', 'chat', 'preference')
_KEYS = ('path', 'replay', 'templates', 'chat_template')
_READ = re.compile(
  r'\.(jsonl.*|(json|txt|csv|parquet|arrow|ya?ml)(\.gz)?)$', re.IGNORECASE
)
# Of a file up to this size every byte counts, of a larger one these blocks.
_WHOLE = 1 << 28
_BLOCKS, _BLOCK = 256, 1 << 20


def text(key: str, path: str, what: str) -> str:
  """The text of a file that `key`, a flag or a key of a config, names.

  Args:
    what: kind of file it is to be, for the message.

  Raises:
    ValueError: it cannot be read.
  """
  try:
    with open(local_path(path), encoding='utf-8') as f:
      return f.read()
  except (OSError, UnicodeDecodeError) as e:
    reason = e.strerror if isinstance(e, OSError) else 'it is not UTF-8'
    raise ValueError(
      f'{key}={path!r} cannot be read ({reason}); name {what}'
    ) from None


def hashes(data: ConfigDict) -> dict[str, dict[str, str]]:
  """{'path': {file: hash}}, and so of each key of config.data that names any.

  Files are named from the directory that the key names. What is no local file
  (names on the hub, SeqIO's tasks) has no hash.
  """
  found = {}
  for key in _KEYS if data.source in _SOURCES else ():
    path = local_path(data[key])
    # `datasets` and templates may lie deeper.
    deep = key == 'templates' or data.source == 'datasets'
    if path and os.path.exists(path):
      found[key] = {name: sha256(file) for name, file in _files(path, deep)}
  return found


def _files(path: str, deep: bool) -> Iterator[tuple[str, str]]:
  """(name, file) of a file or of a directory's files of data."""
  if not os.path.isdir(path):
    yield os.path.basename(path), path
    return
  for folder, folders, names in os.walk(path):
    folders[:] = sorted(folders) if deep else []
    for name in sorted(filter(_READ.search, names)):
      file = os.path.join(folder, name)
      if os.path.isfile(file):
        yield os.path.relpath(file, path), file


def sha256(file: str, whole: int = _WHOLE) -> str:
  """The hash of a file's bytes.

  Of a file larger than `whole` it is that of its size and of 256 blocks of a
  MiB, evenly spaced, its first and its last among them: it takes a fraction of
  a second and misses an edit between two blocks that keeps the size.
  """
  size = os.path.getsize(file)
  with open(file, 'rb') as opened:
    if size <= whole:
      return hashlib.file_digest(opened, 'sha256').hexdigest()
    found = hashlib.sha256(str(size).encode())
    for i in range(_BLOCKS):
      opened.seek(i * max(size - _BLOCK, 0) // (_BLOCKS - 1))
      found.update(opened.read(_BLOCK))
  return found.hexdigest()
