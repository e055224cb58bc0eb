# SPDX-License-Identifier: Apache-2.0
"""Finds, reads and hashes the data files that a config names."""

import contextlib
import dataclasses
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from typing import IO

from ml_collections import ConfigDict

from moepeft.core import files as core_files
from moepeft.data.example import BadRows
from moepeft.data.readers import READERS
from moepeft.data.row_fields import BYTE_ORDER_MARK


@dataclasses.dataclass(frozen=True)
class FileKind:
  """A kind of files of data.

  Attributes:
    endings: endings of the files' names, in lower case; () for any name.
    verb: 'rows are', as in 'rows are read from .jsonl', for messages.
    is_nested: whether subdirectories are searched, too.
  """

  endings: tuple[str, ...]
  verb: str = 'rows are'
  is_nested: bool = False


ROW_FILES = FileKind(('.jsonl', '.jsonl.gz'))
CHAT_FILES = FileKind(
  ('.json', '.jsonl', '.json.gz', '.jsonl.gz'), 'conversations are'
)
TABLE_FILES = FileKind(
  (
    *('.json', '.jsonl', '.csv', '.json.gz', '.jsonl.gz', '.csv.gz'),
    *('.parquet', '.arrow'),
  ),
  is_nested=True,
)
TEXT_FILES = FileKind(('.txt', '.jsonl', '.txt.gz', '.jsonl.gz'), 'text is')
TEMPLATE_FILES = FileKind(('.yaml', '.yml'), 'templates are', is_nested=True)
# Keys of config.data, besides data.path, that name files.
_KINDS_BY_KEY = {
  'replay': TEXT_FILES,
  'templates': TEMPLATE_FILES,
  'chat_template': FileKind(()),
}
# The number of a file's part: train.jsonl-00000-of-00008.
_PART_SUFFIX = re.compile(r'-\d+-of-\d+(?=(\.gz)?$)')
# Hidden files, and temporary files of editors (~$x, #x#) and of macOS (._x).
_HIDDEN_PREFIXES = ('.', '~', '#')
_IGNORED_FOLDERS = ('__MACOSX', '__pycache__')
# Metadata files of `datasets`.
_METADATA_FILES = (
  'config.json',
  'dataset_dict.json',
  'dataset_info.json',
  'dataset_infos.json',
  'state.json',
)
# Files up to this size, in bytes, are hashed completely.
_MAX_FULL_HASH = 1 << 28
# Larger files are hashed at this many blocks of this size.
_NUM_BLOCKS, _BLOCK_SIZE = 256, 1 << 20


def is_data_file(name: str, endings: tuple[str, ...]) -> bool:
  """Whether a file of this name is a data file.

  Hidden and temporary files, backups (train.jsonl.bak) and unfinished downloads
  (train.jsonl.part) are not.

  Args:
    endings: `FileKind.endings`; the case of the name is ignored.
  """
  if name.startswith(_HIDDEN_PREFIXES) or name in _METADATA_FILES:
    return False
  return _PART_SUFFIX.sub('', name.lower()).endswith(endings)


def file_ending(file: str) -> str:
  """The ending of a name without '.gz' and part number: 'jsonl'."""
  name = _PART_SUFFIX.sub('', os.path.basename(file).lower())
  return name.removesuffix('.gz').rpartition('.')[2]


@dataclasses.dataclass(frozen=True)
class DirectoryListing:
  """The contents of a directory.

  Attributes:
    files: paths of its data files, sorted by name.
    left_out: names of all other entries; names of directories end with a
      slash.
  """

  files: tuple[str, ...]
  left_out: tuple[str, ...]


def list_directory(
  folder: str, endings: tuple[str, ...], deep: bool = False
) -> DirectoryListing:
  """Lists the data files of a directory.

  Args:
    endings: `FileKind.endings`.
    deep: whether to search subdirectories, too.

  Raises:
    ValueError: a directory has the name of a data file.
    NotAFile: a data file is a pipe, a socket or a device.
  """
  files, left_out = [], []
  for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
    is_data = is_data_file(entry.name, endings)
    if entry.is_dir():
      hidden = (
        entry.name.startswith(_HIDDEN_PREFIXES)
        or entry.name in _IGNORED_FOLDERS
      )
      if is_data and not hidden:
        raise ValueError(
          f'{entry.path} is a directory, expected a file of that name; rename '
          'it, or name it itself'
        )
      if deep and not hidden:
        listing = list_directory(entry.path, endings, deep)
        files += listing.files
        left_out += [f'{entry.name}/{name}' for name in listing.left_out]
      else:
        left_out.append(f'{entry.name}/')
    elif is_data:
      core_files.check_file(entry.path)
      files.append(entry.path)
    else:
      left_out.append(entry.name)
  return DirectoryListing(tuple(files), tuple(left_out))


def data_files(
  path: str, kind: FileKind, bad: BadRows | None = None
) -> list[str]:
  """The data files of a path: the file itself, or a directory's files.

  Args:
    bad: records the files that are left out.

  Raises:
    ValueError: the path does not exist, or has no file of the kind.
    NotAFile: the path or one of the files is a pipe, a socket or a device.
  """
  path, endings = core_files.local_path(path), kind.endings
  ending_names = ', '.join(endings)
  core_files.check_file(path)
  if os.path.isfile(path):
    if not path.lower().endswith(endings):
      raise ValueError(
        f'{kind.verb} read from {ending_names}; got {path!r}: convert it, or '
        'name a directory of such files'
      )
    return [path]
  if not os.path.isdir(path):
    raise ValueError(
      f'{path!r} does not exist; name a file of {ending_names}, or a directory '
      'of them'
    )
  listing = list_directory(path, endings)
  if bad is not None:
    bad.left_out += listing.left_out
  if not listing.files:
    raise ValueError(f'{path} holds no file of {ending_names}')
  return list(listing.files)


@contextlib.contextmanager
def open_data_file(file: str) -> Iterator[IO[bytes]]:
  """Opens a data file, and decompresses it if its name ends with .gz.

  Raises:
    NotAFile: it is a pipe, a socket or a device.
    ValueError: the first bytes are not UTF-8, or, while it is read, the file
      is damaged or truncated.
  """
  compressed = file.lower().endswith('.gz')
  with core_files.open_file(file) as raw:
    try:
      with gzip.open(raw) if compressed else raw as stream:
        _check_first_bytes(file, stream.peek(4)[:4])
        yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
      raise ValueError(
        f'{file} cannot be read to its end ({e}); copy it again'
      ) from None


def _check_first_bytes(file: str, head: bytes) -> None:
  if head[:2] == b'\x1f\x8b':
    raise ValueError(
      f'{file} is compressed with gzip; give it a name that ends with .gz'
    )
  if head[:2] in (b'\xff\xfe', b'\xfe\xff') or b'\0' in head:
    raise ValueError(
      f'{file} is not UTF-8 (it begins as UTF-16 or UTF-32 does); convert it, '
      'as by iconv -f UTF-16 -t UTF-8'
    )


def read_text(file: str) -> str:
  """Reads a text file without byte order marks.

  Concatenated files may have a byte order mark in the middle, too.

  Raises:
    ValueError: as for `open_data_file`, or the file is not UTF-8.
  """
  with open_data_file(file) as stream:
    raw = stream.read()
  try:
    text = raw.decode().replace(BYTE_ORDER_MARK, '')
    return text.replace('\r\n', '\n').replace('\r', '\n')
  except UnicodeDecodeError as e:
    raise ValueError(
      f'{file} cannot be read as UTF-8 text ({e}); convert or copy it again'
    ) from None


def read_named_text(key: str, path: str, description: str) -> str:
  """Reads the text file that a flag or a config key names.

  Args:
    key: the flag or the key, for the message.
    description: the kind of file, for the message.

  Raises:
    ValueError: the file cannot be read.
  """
  try:
    return core_files.read_text(core_files.local_path(path)).replace(
      BYTE_ORDER_MARK, ''
    )
  except (OSError, UnicodeDecodeError) as e:
    reason = e.strerror if isinstance(e, OSError) else 'it is not UTF-8'
    raise ValueError(
      f'{key}={path!r} cannot be read ({reason}); name {description}'
    ) from None


def data_hashes(data: ConfigDict) -> dict[str, dict[str, str]]:
  """Hashes the local files that config.data names.

  Returns:
    Key of config.data -> file name, relative to the key's path -> hash. Names
    on the hub and SeqIO tasks have no hash.
  """
  reader = READERS.lookup(data.source)
  if reader.files is None:
    return {}
  hashes = {}
  for key, kind in {'path': reader.files, **_KINDS_BY_KEY}.items():
    path = core_files.local_path(data[key])
    if path and os.path.exists(path):
      hashes[key] = {
        name: sha256(file) for name, file in _named_files(path, kind)
      }
  return hashes


def _named_files(path: str, kind: FileKind) -> Iterator[tuple[str, str]]:
  """Yields (name, path) of a file, or of a directory's data files."""
  core_files.check_file(path)
  if not os.path.isdir(path):
    yield os.path.basename(path), path
    return
  if not kind.endings:
    return
  listing = list_directory(path, kind.endings, kind.is_nested)
  for file in listing.files:
    if os.path.isfile(file):
      yield os.path.relpath(file, path), file
  # The metadata files of save_to_disk name the files of its tables.
  for name in listing.left_out if kind == TABLE_FILES else ():
    if os.path.basename(name) in _METADATA_FILES:
      yield name, os.path.join(path, name)


def sha256(file: str, max_full: int = _MAX_FULL_HASH) -> str:
  """The SHA-256 of a file.

  A file of more than `max_full` bytes is hashed by its size and 256 evenly
  spaced blocks of 1 MiB, the first and the last included. This takes a fraction
  of a second, but misses an edit between two blocks that keeps the size.
  """
  size = os.path.getsize(file)
  with core_files.open_file(file) as stream:
    if size <= max_full:
      return hashlib.file_digest(stream, 'sha256').hexdigest()
    digest = hashlib.sha256(str(size).encode())
    for i in range(_NUM_BLOCKS):
      stream.seek(i * max(size - _BLOCK_SIZE, 0) // (_NUM_BLOCKS - 1))
      digest.update(stream.read(_BLOCK_SIZE))
  return digest.hexdigest()
