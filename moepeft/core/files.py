# SPDX-License-Identifier: Apache-2.0
"""Opens regular files only, and replaces files atomically.

Opening a named pipe blocks until another process writes to it, and reading a
device may never end. So all code that reads a path from a user or a request
opens it here, or calls `check_file` before a library opens it.
"""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moepeft.core.ranges import suggestion

# Models and data that ship with the package, by name.
ASSETS = Path(__file__).parents[1] / 'assets'
_PACKAGE = 'package:'
# Read from the end of a file, for its last lines.
_TAIL_BYTES = 1_000_000
_KINDS = (
  (stat.S_ISFIFO, 'a named pipe'),
  (stat.S_ISSOCK, 'a socket'),
  (stat.S_ISCHR, 'a device'),
  (stat.S_ISBLK, 'a device'),
)


def local_path(path: str) -> str:
  """Expands 'package:NAME' and '~'.

  Args:
    path: 'package:NAME' for a directory that ships with moepeft, '~/...' for
      one in the home directory; any other path is returned unchanged.

  Raises:
    ValueError: no directory with that name ships.
  """
  if not path.startswith(_PACKAGE):
    return os.path.expanduser(path)
  name = path.removeprefix(_PACKAGE)
  shipped = sorted(entry.name for entry in ASSETS.iterdir())
  if name not in shipped:
    raise ValueError(
      f'moepeft ships no {name!r}; expected {_PACKAGE}NAME with one of '
      f'{", ".join(shipped)}{suggestion(name, shipped)}'
    )
  return str(ASSETS / name)


class NotAFile(OSError):
  """A path names a pipe, a socket or a device."""

  def __init__(self, path: str | os.PathLike, kind: str):
    reason = f'it is {kind}, expected a regular file'
    super().__init__(errno.EINVAL, reason, os.fspath(path))

  def __str__(self) -> str:
    return f'{self.filename!r} cannot be read: {self.strerror}'


def open_file(
  path: str | os.PathLike, mode: str = 'rb', encoding: str | None = None
) -> IO:
  """Opens a regular file for reading.

  Args:
    path: the file; a symbolic link is followed.
    mode: 'rb' or 'r'.
    encoding: the encoding of a text file; by default 'utf-8-sig', which
      removes a byte order mark.

  Raises:
    NotAFile: the path is a pipe, a socket or a device; it is not opened.
    OSError: the path does not exist, is a directory, or may not be read.
  """
  if mode not in ('r', 'rb'):
    raise ValueError(f"expected mode 'r' or 'rb', got {mode!r}")
  check_file(path)
  if mode == 'r' and encoding is None:
    encoding = 'utf-8-sig'
  return open(path, mode, encoding=encoding, opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
  # The path may have changed since the check, so O_NONBLOCK prevents a pipe
  # from blocking, and the descriptor is checked again.
  descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
  try:
    _check_mode(path, os.fstat(descriptor).st_mode)
  except NotAFile:
    os.close(descriptor)
    raise
  return descriptor


def check_file(path: str | os.PathLike) -> None:
  """
  Raises:
    NotAFile: the path is a pipe, a socket or a device. Nothing is raised for a
      path that does not exist or is a directory.
  """
  try:
    mode = os.stat(path).st_mode
  except (FileNotFoundError, NotADirectoryError):
    return
  _check_mode(path, mode)


def check_files(folder: str | os.PathLike) -> None:
  """Checks a path, or a directory and its entries (not recursively).

  Raises:
    NotAFile: as `check_file`. For libraries that open a directory's files.
  """
  check_file(folder)
  if os.path.isdir(folder):
    for entry in os.scandir(folder):
      check_file(entry.path)


def _check_mode(path: str | os.PathLike, mode: int) -> None:
  for matches, kind in _KINDS:
    if matches(mode):
      raise NotAFile(path, kind)


def read_text(path: str | os.PathLike) -> str:
  """The text of a UTF-8 file, without a byte order mark.

  Raises:
    OSError: as `open_file`.
    UnicodeDecodeError: the text is not UTF-8.
  """
  with open_file(path, 'r') as file:
    return file.read()


def read_bytes(path: str | os.PathLike) -> bytes:
  """The bytes of a file; raises as `open_file`."""
  with open_file(Path(path)) as file:
    return file.read()


def read_tail(path: str | os.PathLike, start: int = 0) -> str:
  """The last megabyte of a text file; '' if it does not exist.

  Args:
    start: an offset in bytes before which nothing is read.
  """
  if not os.path.exists(path):
    return ''
  with open_file(path) as file:
    file.seek(max(start, os.path.getsize(path) - _TAIL_BYTES))
    return file.read().decode('utf-8', errors='replace')


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
  """Yields a temporary path; its file replaces `path` when the block ends.

  The replacement is atomic.

  Raises:
    OSError: the file cannot be written; the old file is unchanged.
  """
  folder, name = os.path.split(os.path.abspath(path))
  descriptor, temporary = tempfile.mkstemp(prefix=f'.{name}.', dir=folder)
  os.close(descriptor)
  try:
    yield temporary
    with open(temporary, 'rb+') as file:
      os.fsync(file.fileno())
    os.chmod(temporary, 0o666 & ~umask())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a UTF-8 file atomically; raises as `replacing`."""
  with (
    replacing(path) as temporary,
    open(temporary, 'w', encoding='utf-8') as file,
  ):
    file.write(text)


def umask() -> int:
  """The process's umask, which can be read only by setting it."""
  mask = os.umask(0)
  os.umask(mask)
  return mask
