# SPDX-License-Identifier: Apache-2.0
"""The processes that a board starts for its runs, and their logs.

A process holds the lock of its log file as long as it or one of its children
lives. A board that is started again therefore knows the processes of the
earlier one, and a number that the system has given to another process is never
signaled.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from moepeft.core import files, secrets, terminal, untrusted
from moepeft.sweeps.attempt import describe_end

_SHAPE = {'pid': int, 'started': float, 'stopping': bool, 'command': [str]}
# Codes of a run that a signal has ended after it saved its step.
_SIGNALED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
# Characters of a log that the page shows.
_MAX_LOG = 20_000


class Jobs:
  """The processes of a board: of each run at most one of a kind at a time."""

  def __init__(self, folder: str):
    """
    Args:
      folder: for the records and the logs; it is created if needed.
    """
    self._folder = folder
    self._processes: dict[tuple[str, str], subprocess.Popen] = {}
    self._lock = threading.RLock()

  def start(self, run: str, kind: str, command: Sequence[str]) -> None:
    """Starts a process.

    Args:
      run: the name of the run.
      kind: 'train', 'chat', ...; a part of a file's name.
      command: the program and its arguments; no shell reads them.

    Raises:
      ValueError: the run has a process of this kind.
    """
    os.makedirs(self._folder, exist_ok=True)
    with self._lock, open(self._path(run, kind, 'log'), 'ab') as log:
      try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise ValueError(
          f'the process {kind!r} of the run {run!r} is running; stop it first'
        ) from None
      except OSError as e:
        raise ValueError(
          f'the file system of {self._folder} has no locks ({e.strerror}), by '
          'which a board knows its processes; name another --workdirs'
        ) from None
      record = self._path(run, kind, 'json')
      with contextlib.suppress(FileNotFoundError):
        os.unlink(record)
      log.truncate(0)
      process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        # Ctrl-C ends the board alone.
        start_new_session=True,
      )
      self._processes[run, kind] = process
      self._write(run, kind, process.pid, command)

  def stop(self, run: str, kind: str, force: bool = False) -> None:
    """Asks a process to end, or kills it with its children.

    Raises:
      ValueError: the board has no such process that is running.
    """
    with self._lock:
      record = self._read(run, kind)
      if not record or not self._is_running(run, kind):
        raise ValueError(
          f'this board runs no process {kind!r} of the run {run!r}; what was '
          'started elsewhere is stopped there'
        )
      self._write(run, kind, record['pid'], record['command'], record)
      with contextlib.suppress(ProcessLookupError):
        if force:
          os.killpg(record['pid'], signal.SIGKILL)
        else:
          # Not the group: a run saves its step with the help of its children.
          os.kill(record['pid'], signal.SIGTERM)

  def state(self, run: str, kind: str) -> dict[str, Any]:
    """The state of a process, as the page shows it; {} if there was none.

    Its keys are 'running', 'stopping', 'started' (seconds), 'command' and
    'error', the sentence of a process that failed.
    """
    record = self._read(run, kind)
    if not record:
      return {}
    is_running = self._is_running(run, kind)
    state = {
      'running': is_running,
      'stopping': record['stopping'],
      'started': record['started'],
      'command': record['command'],
    }
    if is_running:
      return state
    return state | {'error': self._error(run, kind, record['stopping'])}

  def log(self, run: str, kind: str) -> str:
    """The end of a process's output, without secrets and control characters."""
    text = files.read_tail(self._path(run, kind, 'log'))[-_MAX_LOG:]
    # A progress bar is written over itself.
    lines = [line.rpartition('\r')[2] for line in text.split('\n')]
    return terminal.visible(secrets.redact('\n'.join(lines)))

  def close(self, kind: str) -> None:
    """Ends the processes of a kind that this board has started."""
    for run, other_kind in list(self._processes):
      if other_kind == kind and self._is_running(run, kind):
        self.stop(run, kind)

  def _error(self, run: str, kind: str, stopping: bool) -> str:
    """The sentence that a process ended with; '' if it ended well."""
    text = self.log(run, kind)
    process = self._processes.get((run, kind))
    code = None if process is None else process.poll()
    if code is None:
      # Its board has ended, and nobody knows the code.
      failed = re.search(r'^(error: |Traceback )', text, re.M)
      return describe_end(1, text) if failed else ''
    if code in (0, *_SIGNALED) or stopping:
      return ''
    return describe_end(code, text)

  def _is_running(self, run: str, kind: str) -> bool:
    process = self._processes.get((run, kind))
    if process is not None:
      # Collects the code of one that has ended.
      process.poll()
    try:
      # Not while `start` takes the lock.
      with self._lock, open(self._path(run, kind, 'log')) as log:
        fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
    except OSError:
      return False
    return False

  def _path(self, run: str, kind: str, ending: str) -> str:
    return os.path.join(self._folder, f'{quote(run, safe="")}.{kind}.{ending}')

  def _read(self, run: str, kind: str) -> dict[str, Any]:
    path = self._path(run, kind, 'json')
    if not os.path.exists(path):
      return {}
    record = untrusted.read_json_object(path)
    untrusted.check_shape(record, _SHAPE)
    return record

  def _write(self, run, kind, pid, command, earlier=None) -> None:
    record = {
      'pid': pid,
      'started': earlier['started'] if earlier else time.time(),
      'stopping': earlier is not None,
      'command': [*command],
    }
    files.write_text(self._path(run, kind, 'json'), json.dumps(record))
