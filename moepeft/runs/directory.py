# SPDX-License-Identifier: Apache-2.0
"""Locks a run's work directory for one process, and checks that it exists."""

import contextlib
import errno
import fcntl
import os
import socket
from typing import IO

from moepeft.core.disk import is_full, next_start
from moepeft.runs.run import Run

# Errors of flock on file systems without locks (some network disks).
_NO_LOCK_ERRORS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class Workdir:
  """A work directory that is locked by this process until `close`.

  The kernel releases the lock when the process ends.
  """

  def __init__(self, path: str, lock: IO[str]):
    self.path = path
    self._lock = lock

  def check(self) -> None:
    """Checks, before anything is written, that the directory still exists.

    Libraries would create a missing directory, and the run would go on in it.

    Raises:
      LostWorkdir: the directory was deleted, moved or replaced.
    """
    try:
      file_stat = os.stat(Run(self.path).lock_file)
    except OSError:
      pass
    else:
      if os.path.samestat(file_stat, os.fstat(self._lock.fileno())):
        return
    raise LostWorkdir(
      f'the work directory {self.path!r} was deleted, moved or replaced while '
      f'the run wrote to it; {self._advice()}'
    )

  def _advice(self) -> str:
    """The remedy for a directory that was moved or deleted."""
    try:
      # On Linux; the link of a deleted file ends in ' (deleted)'.
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
    """Releases the lock; may be called twice."""
    if not self._lock.closed:
      self._lock.truncate(0)
      self._lock.close()

  def __enter__(self) -> 'Workdir':
    return self

  def __exit__(self, kind, error, trace) -> None:
    del kind, trace
    try:
      # A lost directory is the cause of other errors.
      if isinstance(error, Exception) and not isinstance(error, LostWorkdir):
        self.check()
    finally:
      self.close()


def open_workdir(path: str) -> Workdir:
  """Creates the directory if needed, checks that it is writable and locks it.

  The file <path>/lock names the process. It is never removed, as another
  process may have just opened it.

  Raises:
    ValueError: the directory is not writable, or another run has locked it.
  """
  lock = None
  try:
    os.makedirs(path, exist_ok=True)
    lock = open(Run(path).lock_file, 'a+')
    _acquire(lock, path)
    lock.truncate(0)
    print(f'pid {os.getpid()} on {socket.gethostname()}', file=lock, flush=True)
  except (OSError, ValueError) as e:
    if lock is not None:
      # Closing tries to write the buffered text again.
      with contextlib.suppress(OSError):
        lock.close()
    if isinstance(e, ValueError):
      raise
    raise ValueError(_not_writable(path, e)) from None
  return Workdir(path, lock)


def is_locked(path: str) -> bool:
  """Whether a process has locked a run's directory, which need not exist."""
  try:
    with open(Run(path).lock_file) as lock:
      fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:
    # There is no file, or no locks.
    return False
  return False


def _acquire(lock: IO[str], path: str) -> None:
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
    if e.errno not in _NO_LOCK_ERRORS:
      raise
    print(
      f'the file system of {path} has no locks ({e.strerror}): nothing keeps a '
      'second run out of this work directory',
      flush=True,
    )


def _not_writable(path: str, error: OSError) -> str:
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
  """The work directory was deleted, moved or replaced."""
