# SPDX-License-Identifier: Apache-2.0
"""Files that users name: the data files among them, their text, hashes."""

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
    endings: of their names, in lower case; none where any name will do.
    verb: 'rows are', as in 'rows are read from .jsonl'.
    is_nested: whether files in a directory's directories count, too.
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
# Files that keys of config.data name beside data.path.
_KINDS_BY_KEY = {
  'replay': TEXT_FILES,
  'templates': TEMPLATE_FILES,
  'chat_template': FileKind(()),
}
# Of a large file's parts: train.jsonl-00000-of-00008.
_PART = re.compile(r'-\d+-of-\d+(?=(\.gz)?$)')
# What hides a file, or is of an editor or a program that has it open: .x, ~$x,
# #x#. macOS writes ._x beside x on foreign disks.
_HIDDEN_PREFIXES = ('.', '~', '#')
_FOLDERS = ('__MACOSX', '__pycache__')
# JSON that describes a data set beside it, as `datasets` has them.
_DESCRIPTIONS = (
  'config.json',
  'dataset_dict.json',
  'dataset_info.json',
  'dataset_infos.json',
  'state.json',
)
# Of a file up to this size every byte counts, of a larger one these blocks.
_WHOLE = 1 << 28
_BLOCKS, _BLOCK = 256, 1 << 20


def is_data_file(name: str, endings: tuple[str, ...]) -> bool:
  """Whether a file of this name holds data.

  Left out are hidden files and those of editors, backups (train.jsonl.bak) and
  downloads that are under way (train.jsonl.part).

  Args:
    endings: of a `FileKind`; those of the name may be in any case.
  """
  if name.startswith(_HIDDEN_PREFIXES) or name in _DESCRIPTIONS:
    return False
  return _PART.sub('', name.lower()).endswith(endings)


def file_ending(file: str) -> str:
  """The ending of a name, '.gz' and a part's number aside: 'jsonl'."""
  name = _PART.sub('', os.path.basename(file).lower())
  return name.removesuffix('.gz').rpartition('.')[2]


@dataclasses.dataclass(frozen=True)
class DirectoryListing:
  """A directory.

  Attributes:
    files: paths of its data files, in the order of their names.
    left_out: names of all else that is in it, a directory's with a slash.
  """

  files: tuple[str, ...]
  left_out: tuple[str, ...]


def list_directory(
  folder: str, endings: tuple[str, ...], deep: bool = False
) -> DirectoryListing:
  """The data files of a directory.

  Args:
    endings: of a `FileKind`.
    deep: whether those of its directories count, too.

  Raises:
    ValueError: one of them is a directory, though named as a file is.
    NotAFile: one of them is a pipe, a socket or a device.
  """
  files, left_out = [], []
  for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
    data = is_data_file(entry.name, endings)
    if entry.is_dir():
      hidden = entry.name.startswith(_HIDDEN_PREFIXES) or entry.name in _FOLDERS
      if data and not hidden:
        raise ValueError(
          f'{entry.path} is a directory, expected a file of that name; rename '
          'it, or name it itself'
        )
      if deep and not hidden:
        inside = list_directory(entry.path, endings, deep)
        files += inside.files
        left_out += [f'{entry.name}/{name}' for name in inside.left_out]
      else:
        left_out.append(f'{entry.name}/')
    elif data:
      core_files.check_file(entry.path)
      files.append(entry.path)
    else:
      left_out.append(entry.name)
  return DirectoryListing(tuple(files), tuple(left_out))


def data_files(
  path: str, kind: FileKind, bad: BadRows | None = None
) -> list[str]:
  """The files of data under a path: itself, or those of a directory.

  Args:
    bad: told of what is left out.

  Raises:
    ValueError: nothing is there, or nothing of the kind.
    NotAFile: it is a pipe, a socket or a device, or one of its files is.
  """
  path, endings = core_files.local_path(path), kind.endings
  kinds = ', '.join(endings)
  core_files.check_file(path)
  if os.path.isfile(path):
    if not path.lower().endswith(endings):
      raise ValueError(
        f'{kind.verb} read from {kinds}; got {path!r}: convert it, or '
        'name a directory of such files'
      )
    return [path]
  if not os.path.isdir(path):
    raise ValueError(
      f'{path!r} does not exist; name a file of {kinds}, or a directory of them'
    )
  listing = list_directory(path, endings)
  if bad is not None:
    bad.left_out += listing.left_out
  if not listing.files:
    raise ValueError(f'{path} holds no file of {kinds}')
  return list(listing.files)


@contextlib.contextmanager
def open_data_file(file: str) -> Iterator[IO[bytes]]:
  """A file's bytes, unpacked where its name ends with .gz.

  Raises:
    NotAFile: it is a pipe, a socket or a device.
    ValueError: it is not UTF-8 by its first bytes, or it ends early or is
      damaged; raised where it is met.
  """
  packed = file.lower().endswith('.gz')
  with core_files.open_file(file) as raw:
    try:
      with gzip.open(raw) if packed else raw as stream:
        _check_beginning(file, stream.peek(4)[:4])
        yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
      raise ValueError(
        f'{file} cannot be read to its end ({e}); copy it again'
      ) from None


def _check_beginning(file: str, head: bytes) -> None:
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
  """All of a text file, without byte order marks wherever they stand.

  Files that were put together have one in their middle, too.

  Raises:
    ValueError: as `opened`, or it is not UTF-8.
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
  """The text of a file that `key`, a flag or a key of a config, names.

  Args:
    description: of the kind of file, for the message.

  Raises:
    ValueError: it cannot be read.
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
  """{'path': {file: hash}}, and so of each key of config.data that names any.

  Files are those that readers read, named from the directory that the key
  names. What is no local file (names on the hub, SeqIO's tasks) has no hash.
  """
  reader = READERS.lookup(data.source)
  if reader.files is None:
    return {}
  hashes = {}
  for key, kind in {'path': reader.files, **_KINDS_BY_KEY}.items():
    path = core_files.local_path(data[key])
    if path and os.path.exists(path):
      hashes[key] = {name: sha256(file) for name, file in _named(path, kind)}
  return hashes


def _named(path: str, kind: FileKind) -> Iterator[tuple[str, str]]:
  """(name, file) of a file or of a directory's files of data."""
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
  # save_to_disk's descriptions name the files of its tables.
  for name in listing.left_out if kind == TABLE_FILES else ():
    if os.path.basename(name) in _DESCRIPTIONS:
      yield name, os.path.join(path, name)


def sha256(file: str, whole: int = _WHOLE) -> str:
  """The hash of a file's bytes.

  Of a file larger than `whole` it is that of its size and of 256 blocks of a
  MiB, evenly spaced, its first and its last among them: it takes a fraction of
  a second and misses an edit between two blocks that keeps the size.
  """
  size = os.path.getsize(file)
  with core_files.open_file(file) as stream:
    if size <= whole:
      return hashlib.file_digest(stream, 'sha256').hexdigest()
    digest = hashlib.sha256(str(size).encode())
    for i in range(_BLOCKS):
      stream.seek(i * max(size - _BLOCK, 0) // (_BLOCKS - 1))
      digest.update(stream.read(_BLOCK))
  return digest.hexdigest()
