# SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoint directories: whole, or a clear error."""

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
    config: of its family, e.g. a T5Config.
    params: nested dict of NumPy arrays, layers on axis 0.
    sha256: content hash of what the files hold, whatever dtype was asked for;
      see `moepeft.models.weight_mapping.content_hash`.
    path: the directory or file that was read.
  """

  config: Any
  params: Tree
  sha256: str
  path: str


# All that a directory may hold for `directory` to replace it.
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
def directory(path: str, overwrite: bool = False) -> Iterator[Path]:
  """A directory to write into, which becomes `path` when all went well.

  At any moment `path` is the old directory or the new one, whole; where the
  file system cannot exchange two directories, the old one may be left as
  `.<name>.*.old`, and the next call puts it back.

  Raises:
    CheckpointError: `path` holds files and `overwrite` is False, or files
      that no checkpoint has, which it would be a pity to delete; or the disk
      is full.
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
    # safetensors makes files that only their owner can read.
    for file in temporary.rglob('*'):
      if file.is_file():
        file.chmod(0o666 & ~files.umask())
    if target.exists():
      replace_directory(target, temporary)
    else:
      temporary.rename(target)
  except Exception as error:
    # Of safetensors and TensorStore too, which have errors of their own.
    if not disk.is_full(error):
      raise
    raise CheckpointError(
      f'the disk of {target} is full; free some space, or name another output'
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(target: Path, new: Path) -> None:
  """Puts one directory in the place of another, which is deleted."""
  if exchange(target, new):
    # The old one, under the temporary name.
    shutil.rmtree(new)
    return
  old = new.with_name(f'{new.name}{_OLD}')
  target.rename(old)
  try:
    new.rename(target)
  except BaseException:
    old.rename(target)
    raise
  shutil.rmtree(old)


_OLD = '.old'
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(path_a: Path, path_b: Path) -> bool:
  """Swaps two paths in one step; False where the system cannot.

  Raises:
    OSError: it can, and these it does not swap.
  """
  try:
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
  except (AttributeError, OSError):
    # Not Linux, or a C library without it.
    return False
  paths = _AT_FDCWD, os.fsencode(path_a), _AT_FDCWD, os.fsencode(path_b)
  if renameat2(*paths, _RENAME_EXCHANGE) == 0:
    return True
  code = ctypes.get_errno()
  if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
    return False
  raise OSError(code, os.strerror(code), os.fspath(path_a))


def recover(target: Path) -> None:
  """Puts back an old directory, where a process was killed as it replaced it.

  It waits as `.<name>.*.old` until the new one is in place. Whatever else such
  a process left beside `target` is named.
  """
  pattern = f'.{glob.escape(target.name)}.????????'
  waiting = [*target.parent.glob(f'{pattern}{_OLD}')]
  if waiting and not target.exists():
    newest = max(waiting, key=lambda path: path.stat().st_mtime_ns)
    print(f'{target} was left half replaced: put its old content back')
    newest.rename(target)
    waiting.remove(newest)
  for path in (*waiting, *target.parent.glob(pattern)):
    print(
      f'note: {path} is left of another call, ended or under way; remove it if '
      'none is under way'
    )


def check_output(path: Path, overwrite: bool) -> None:
  """Raises a CheckpointError where `path` must not be written.

  What an interrupted call left of it is put back first.
  """
  recover(path)
  if path.is_symlink() or (path.exists() and not path.is_dir()):
    raise CheckpointError(f'{path} is not a directory: name another output')
  names = sorted(os.listdir(path)) if path.exists() else []
  foreign = [
    n
    for n in names
    if not any(fnmatch.fnmatch(n, pattern) for pattern in _CHECKPOINT_FILES)
  ]
  if names and not overwrite:
    raise CheckpointError(
      f'{path} already holds {names[0]}: name an empty or new directory, or '
      'pass overwrite (--overwrite) to replace it'
    )
  if foreign:
    raise CheckpointError(
      f'{path} holds {foreign[0]}, which is no part of a checkpoint: delete '
      'the directory yourself or name another one'
    )


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object from a file, or a CheckpointError that names the file.

  Raises:
    CheckpointError: it is absent, not JSON, or no object.
    OSError: it cannot be read, or is no regular file.
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
  """Writes JSON whose bytes depend on `value` alone."""
  text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
  path.write_text(text + '\n', encoding='utf-8')


class Tensors:
  """The tensors of one safetensors file, or of several as one.

  Attributes:
    shapes: {name: shape} of all of them.
  """

  def __init__(self, paths: Mapping[str, Path] | list[Path]):
    """Opens the files; nothing is read before `fetch`.

    Raises:
      CheckpointError: a file is absent, truncated or not safetensors.
    """
    self.shapes: dict[str, Shape] = {}
    self._files = {}
    for path in paths:
      check_file(path)
      opened = damaged_if(path, lambda path=path: safe_open(path, 'numpy'))
      for name in opened.keys():
        self.shapes[name] = tuple(opened.get_slice(name).get_shape())
        self._files[name] = (path, opened)

  def fetch(self, name: str) -> np.ndarray:
    """Reads one tensor into memory of its own."""
    path, opened = self._files[name]
    return damaged_if(path, lambda: opened.get_tensor(name))


def damaged_if(path: Path, read: Callable[[], Any]) -> Any:
  """Turns what safetensors says of a damaged file into one sentence."""
  try:
    return read()
  except FileNotFoundError:
    raise CheckpointError(
      f'{path} does not exist, though the files beside it expect it: copy it'
    ) from None
  except (SafetensorError, TypeError, ValueError) as error:
    raise CheckpointError(
      f'{path} is truncated or damaged ({error}): copy it again'
    ) from None
