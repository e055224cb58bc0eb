# SPDX-License-Identifier: Apache-2.0
"""The processes that run a trial, one after the other, and how they ended."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from moepeft.core import files, untrusted
from moepeft.runs.directory import is_locked
from moepeft.sweeps.directory import SweepDirectory
from moepeft.sweeps.trials import Trial

# Read from the end of a file, for its last lines.
_TAIL_BYTES = 1_000_000

Command = Callable[[Trial, str], Sequence[str]]


class Attempt:
  """A trial that is being run.

  A process of a sweep that was killed goes on without it: the trial then waits
  until that process ends, and the next one finds its checkpoints or its end.
  """

  def __init__(self, directory: SweepDirectory, trial: Trial, command: Command):
    """
    Args:
      command: (trial, module) -> the command line of that module.
    """
    self.trial = trial
    self._directory, self._command = directory, command
    self._start_time = time.monotonic()
    self._process: subprocess.Popen | None = None
    self._stage: str | None = None
    self._log_start = 0
    self._start()

  @property
  def seconds(self) -> float:
    return time.monotonic() - self._start_time

  def is_done(self) -> bool:
    """Whether the trial ended; starts its next process when it can."""
    if self._process is not None:
      code = self._process.poll()
      if code is None:
        return False
      # A stage that ends well and is still the next one would never end.
      if code != 0 or self._directory.stage(self.trial) == self._stage:
        return True
    return self._start()

  def error(self) -> str:
    """The sentence that the run ended with; '' if it ended well."""
    if self._directory.stage(self.trial) is None:
      return ''
    if self._process.returncode == 0:
      return f'{self._stage} ended without its last file'
    return describe_end(
      self._process.returncode,
      _tail(self._directory.log_file(self.trial), self._log_start),
    )

  def interrupt(self) -> None:
    """Asks the run to save its step and end."""
    if self._process is not None:
      self._process.send_signal(signal.SIGTERM)

  def wait(self) -> None:
    if self._process is not None:
      self._process.wait()

  def kill(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.wait()

  def _start(self) -> bool:
    """Starts the next process, if it can; returns whether the trial ended."""
    if is_locked(self._directory.run(self.trial).path):
      return False
    with open(self._directory.log_file(self.trial), 'ab') as log:
      # The process inherits the lock, and keeps it where the sweep is killed.
      try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
      except OSError:
        # The file system has no locks.
        pass
      self._stage = self._directory.stage(self.trial)
      if self._stage is None:
        return True
      self._log_start = log.tell()
      self._process = subprocess.Popen(
        self._command(self.trial, self._stage),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        # Ctrl-C reaches the sweep alone, which ends its runs itself.
        start_new_session=True,
      )
    return False


def describe_end(code: int, output: str) -> str:
  """The error of a run, in one sentence.

  Args:
    code: of the process's exit; negative for a signal.
    output: the end of its output.
  """
  lines = [line.strip() for line in output.splitlines() if line.strip()]
  errors = [line for line in lines if line.startswith('error: ')]
  if errors:
    return errors[-1].removeprefix('error: ')
  if code < 0:
    name = signal.Signals(-code).name
    cause = ', perhaps as memory ran out' if -code == signal.SIGKILL else ''
    return f'the run was ended by {name}{cause}'
  return lines[-1] if lines else f'the run ended with code {code}'


def last_metrics(path: str) -> tuple[int, float | None]:
  """(step, loss) of the last training row of a metrics log; (0, None) without.

  Only the end of the file is read.
  """
  for line in reversed(_tail(path).splitlines(keepends=True)):
    if line.endswith('\n') and '"loss"' in line:
      try:
        row = untrusted.parse_json(line)
        return row['step'], row['loss']
      except (untrusted.Malformed, KeyError):
        # The first line may be the end of one.
        break
  return 0, None


def _tail(path: str, start: int = 0) -> str:
  """The end of a file, from an offset on; '' if it does not exist."""
  if not os.path.exists(path):
    return ''
  with files.open_file(path) as file:
    file.seek(max(start, os.path.getsize(path) - _TAIL_BYTES))
    return file.read().decode('utf-8', errors='replace')
