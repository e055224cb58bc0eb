# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoint directories, and writes them atomically."""

import contextlib
import ctypes
import dataclasses
import errno
import fnmatch
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moepeft.core import disk, files, untrusted
from moepeft.core.files import check_file
from moepeft.models.weight_mapping import CheckpointError, Shape, Tree


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
  """A base model in memory.

  Attributes:
    config: the config of the model family, e.g. a T5Config.
    params: nested dict of NumPy arrays, layers on axis 0.
    sha256: content hash of the stored weights, independent of the requested
      dtype; see `moepeft.models.weight_mapping.content_hash`.
    path: the directory or file from which the model was read.
  """

  config: Any
  params: Tree
  sha256: str
  path: str


# Names of the files and directories of a checkpoint. A directory with other
# files is never replaced.
_CHECKPOINT_FILES = (
  '*.safetensors',
  '*.json',
  '*.model',
  '*.jinja',
  '*.txt',
  '*.md',
  'checkpoint',
  'checkpoint_*',
  'base',
  'adapter',
)


@contextlib.contextmanager
def atomic_directory(path: str, overwrite: bool = False) -> Iterator[Path]:
  """Creates or replaces a directory atomically.

  The context manager yields a temporary directory to write into. On success
  the temporary directory becomes `path`; after an exception it is deleted. At
  any time `path` is either the complete old or the complete new directory. On a
  file system that cannot exchange two directories, a killed process may leave
  only a backup, `.<name>.*.old`; the next call restores it.

  Raises:
    CheckpointError: `path` contains files and `overwrite` is False, or it
      contains files that do not belong to a checkpoint, or the disk is full.
  """
  target = Path(path)
  check_output(target, overwrite)
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = Path(
    tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent)
  )
  try:
    temporary.chmod(0o777 & ~files.umask())
    yield temporary
    # safetensors creates files with mode 600.
    for file in temporary.rglob('*'):
      if file.is_file():
        file.chmod(0o666 & ~files.umask())
    if target.exists():
      replace_directory(target, temporary)
    else:
      temporary.rename(target)
  except Exception as error:
    # safetensors and TensorStore raise their own exception types, not OSError.
    if not disk.is_full(error):
      raise
    raise CheckpointError(
      f'the disk of {target} is full; free some space, or name another output'
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(target: Path, new: Path) -> None:
  """Replaces the directory `target` by `new`, and deletes the old content."""
  if exchange(target, new):
    # After the exchange, `new` is the path of the old content.
    shutil.rmtree(new)
    return
  backup = new.with_name(f'{new.name}{_BACKUP_SUFFIX}')
  target.rename(backup)
  try:
    new.rename(target)
  except BaseException:
    backup.rename(target)
    raise
  shutil.rmtree(backup)


_BACKUP_SUFFIX = '.old'
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(path_a: Path, path_b: Path) -> bool:
  """Exchanges two paths atomically.

  Returns:
    False if the system or the file system does not support it.

  Raises:
    OSError: the exchange failed for another reason.
  """
  try:
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
  except (AttributeError, OSError):
    # The system is not Linux, or the C library does not have renameat2.
    return False
  paths = _AT_FDCWD, os.fsencode(path_a), _AT_FDCWD, os.fsencode(path_b)
  if renameat2(*paths, _RENAME_EXCHANGE) == 0:
    return True
  code = ctypes.get_errno()
  if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
    return False
  raise OSError(code, os.strerror(code), os.fspath(path_a))


def recover(target: Path) -> None:
  """Restores `target` from its backup if a process was killed.

  A process that is killed while it replaces `target` may leave a backup. This
  function also prints the paths of temporary directories that other processes
  have not deleted.
  """
  pattern = f'.{glob.escape(target.name)}.????????'
  backups = [*target.parent.glob(f'{pattern}{_BACKUP_SUFFIX}')]
  if backups and not target.exists():
    newest = max(backups, key=lambda path: path.stat().st_mtime_ns)
    print(
      f'{target} is missing after an interrupted write: restored its backup'
    )
    newest.rename(target)
    backups.remove(newest)
  for path in (*backups, *target.parent.glob(pattern)):
    print(
      f'note: {path} belongs to another process that writes {target.name}, or '
      'was interrupted; remove it if no such process is running'
    )


def check_output(path: Path, overwrite: bool) -> None:
  """Raises a CheckpointError if `path` must not be written.

  Restores a backup of `path` first, if an interrupted call has left one.
  """
  recover(path)
  if path.is_symlink() or (path.exists() and not path.is_dir()):
    raise CheckpointError(f'{path} is not a directory: name another output')
  names = sorted(os.listdir(path)) if path.exists() else []
  unexpected = [
    name
    for name in names
    if not any(fnmatch.fnmatch(name, pattern) for pattern in _CHECKPOINT_FILES)
  ]
  if names and not overwrite:
    raise CheckpointError(
      f'{path} already contains {names[0]}: name an empty or new directory, or '
      'pass overwrite (--overwrite) to replace it'
    )
  if unexpected:
    raise CheckpointError(
      f'{path} contains {unexpected[0]}, which is not part of a checkpoint: '
      'delete the directory yourself or name another one'
    )


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object from a file.

  Raises:
    CheckpointError: the file does not exist, or its content is not a JSON
      object.
    OSError: the file cannot be read, or is not a regular file.
  """
  try:
    return untrusted.read_json_object(path)
  except FileNotFoundError:
    raise CheckpointError(
      f'{path} does not exist: expected it beside the other files'
    ) from None
  except untrusted.Malformed as error:
    raise CheckpointError(str(error)) from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  """Writes JSON with sorted keys, so that equal values give equal bytes."""
  text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
  path.write_text(text + '\n', encoding='utf-8')


class Tensors:
  """The tensors of one or more safetensors files.

  Attributes:
    shapes: {name: shape} of all tensors.
  """

  def __init__(self, paths: Mapping[str, Path] | list[Path]):
    """Opens the files and reads their headers; `fetch` reads the tensors.

    Raises:
      CheckpointError: a file does not exist, is truncated, or is not in the
        safetensors format.
    """
    self.shapes: dict[str, Shape] = {}
    self._files = {}
    for path in paths:
      check_file(path)
      handle = read_or_raise(path, lambda path=path: safe_open(path, 'numpy'))
      for name in handle.keys():
        self.shapes[name] = tuple(handle.get_slice(name).get_shape())
        self._files[name] = (path, handle)

  def fetch(self, name: str) -> np.ndarray:
    """Reads one tensor into a new array."""
    path, handle = self._files[name]
    return read_or_raise(path, lambda: handle.get_tensor(name))


def read_or_raise(path: Path, read: Callable[[], Any]) -> Any:
  """Calls `read`, and converts errors of safetensors to a CheckpointError."""
  try:
    return read()
  except FileNotFoundError:
    raise CheckpointError(
      f'{path} does not exist, but other files of the checkpoint refer to it: '
      'copy it'
    ) from None
  except (SafetensorError, TypeError, ValueError) as error:
    raise CheckpointError(
      f'{path} is truncated or damaged ({error}): copy it again'
    ) from None
