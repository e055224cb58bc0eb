# SPDX-License-Identifier: Apache-2.0
"""A run's directory: one process at a time, and what a full disk means."""

import contextlib
import errno
import fcntl
import os
import socket
from typing import IO

from moepeft.core.disk import is_full, next_start
from moepeft.runs.run import Run

# What flock answers where the file system has no locks (some network disks).
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class Workdir:
  """A work directory that this process alone writes to, until `close`.

  The lock is the kernel's and falls away with the process, however it ends.
  """

  def __init__(self, path: str, lock: IO[str]):
    self.path = path
    self._lock = lock

  def check(self) -> None:
    """To be called before anything is written: is the directory still there?

    Libraries would make it anew, empty, and the run would go on in it.

    Raises:
      LostWorkdir: it was deleted, moved or replaced.
    """
    lock = os.fstat(self._lock.fileno())
    try:
      there = os.stat(Run(self.path).lock_file)
    except OSError:
      there = None
    if there and (there.st_dev, there.st_ino) == (lock.st_dev, lock.st_ino):
      return
    raise LostWorkdir(
      f'the work directory {self.path!r} was deleted, moved or replaced while '
      f'the run wrote to it; {self._remains()}'
    )

  def _remains(self) -> str:
    """The advice on a directory that has moved, or is gone."""
    try:
      # As Linux says it; the link of a deleted file ends in ' (deleted)'.
      lock = os.readlink(f'/proc/self/fd/{self._lock.fileno()}')
    except OSError:
      return f'put it back, then the same command {next_start(None)}'
    folder = os.path.dirname(lock)
    step = Run(folder).latest_step()
    if os.path.lexists(lock):
      return f'move {folder!r} back, then the same command {next_start(step)}'
    if step is None:
      return 'no checkpoint is left of it, and the same command begins anew'
    start = next_start(step)
    return f'its lock file is gone, the same command {start} in {folder!r}'

  def close(self) -> None:
    """Lets others in; may be called again."""
    if not self._lock.closed:
      self._lock.truncate(0)
      self._lock.close()

  def __enter__(self) -> 'Workdir':
    return self

  def __exit__(self, kind, error, trace) -> None:
    del kind, trace
    try:
      # An error of a directory that is gone says less than that.
      if isinstance(error, Exception) and not isinstance(error, LostWorkdir):
        self.check()
    finally:
      self.close()


def open_workdir(path: str) -> Workdir:
  """Makes the directory, sees that it can be written, and locks it.

  The file <path>/lock says who holds it. It stays there: a lock file that is
  removed may be one that another process has just opened.

  Raises:
    ValueError: it cannot be written, or another run is in it.
  """
  lock = None
  try:
    os.makedirs(path, exist_ok=True)
    lock = open(Run(path).lock_file, 'a+')
    _take(lock, path)
    lock.truncate(0)
    print(f'pid {os.getpid()} on {socket.gethostname()}', file=lock, flush=True)
  except (OSError, ValueError) as e:
    if lock is not None:
      # What could not be written must not be tried again on closing.
      with contextlib.suppress(OSError):
        lock.close()
    if isinstance(e, ValueError):
      raise
    raise ValueError(_unwritable(path, e)) from None
  return Workdir(path, lock)


def _take(lock: IO[str], path: str) -> None:
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    lock.seek(0)
    holder = lock.read().strip() or 'another process'
    raise ValueError(
      f'another run is in the work directory {path!r} ({holder}); wait for it '
      'or stop it, or name another --workdir'
    ) from None
  except OSError as e:
    if e.errno not in _NO_LOCKS:
      raise
    print(
      f'the file system of {path} has no locks ({e.strerror}): nothing keeps a '
      'second run out of this work directory',
      flush=True,
    )


def _unwritable(path: str, error: OSError) -> str:
  if is_full(error):
    return (
      f'the disk of the work directory {path!r} is full ({error.strerror}); '
      'free space, or name another --workdir'
    )
  return (
    f'cannot write to the work directory {path!r} ({error.strerror}); name '
    'another with --workdir'
  )


class LostWorkdir(ValueError):
  """A work directory that is no longer where it was."""
