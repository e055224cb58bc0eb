# SPDX-License-Identifier: Apache-2.0
"""The processes that run a trial, one after the other, and how they ended."""

import contextlib
import fcntl
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from moepeft.core import files, untrusted
from moepeft.runs.directory import is_locked
from moepeft.sweeps.directory import TRAIN, SweepDirectory
from moepeft.sweeps.trials import Trial

# (trials, module) -> the command line of that module.
Command = Callable[[Sequence[Trial], str], Sequence[str]]


class Attempt:
  """A trial that is being run, or several that one process trains together.

  Trials that are trained together end their attempt with that; what follows,
  such as moepeft.evaluate, is an attempt for each.

  A process of a sweep that was killed goes on without it: the attempt then
  waits until that process ends, and the next one finds its checkpoints or its
  end.

  Attributes:
    trials: those of the attempt.
  """

  def __init__(
    self,
    directory: SweepDirectory,
    trials: Sequence[Trial],
    command: Command,
  ):
    self.trials = tuple(trials)
    self._directory, self._command = directory, command
    self._start_time = time.monotonic()
    self._process: subprocess.Popen | None = None
    self._stage: str | None = None
    self._process_log = ''
    self._log_starts: dict[str, int] = {}
    self._start()

  @property
  def seconds(self) -> float:
    return time.monotonic() - self._start_time

  def is_done(self) -> bool:
    """Whether the attempt ended; starts its next process when it can."""
    if self._process is not None:
      code = self._process.poll()
      if code is None:
        return False
      # A stage that ends well and is still the next one would never end.
      stages = {self._directory.stage(trial) for trial in self.trials}
      if code != 0 or self._stage in stages or len(self.trials) > 1:
        return True
    return self._start()

  def error(self, trial: Trial) -> str:
    """The sentence that the run of a trial ended with; '' if it ended well."""
    stage = self._directory.stage(trial)
    if stage is None or stage != self._stage:
      return ''
    if self._process.returncode == 0:
      return f'{self._stage} ended without its last file'
    # The last error counts, and a trial's own is later than its process's.
    output = ''.join(
      files.read_tail(path, self._log_starts[path])
      for path in dict.fromkeys(
        (self._process_log, self._directory.log_file(trial))
      )
    )
    return describe_end(self._process.returncode, output)

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
    """Starts the next process, if it can; returns whether the attempt ended."""
    if any(is_locked(self._directory.run(t).path) for t in self.trials):
      return False
    with contextlib.ExitStack() as stack:
      logs = [
        stack.enter_context(open(self._directory.log_file(trial), 'ab'))
        for trial in self.trials
      ]
      # The process inherits the locks, and keeps them where the sweep is
      # killed.
      for log in logs:
        try:
          fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          return False
        except OSError:
          # The file system has no locks.
          pass
      stages = [self._directory.stage(trial) for trial in self.trials]
      self._stage = stages[0] if len(stages) == 1 else TRAIN
      if self._stage is None or self._stage not in stages:
        return True
      trials = [
        t for t in self.trials if self._directory.stage(t) == self._stage
      ]
      self._process_log = self._directory.log_file(*trials)
      logs.append(stack.enter_context(open(self._process_log, 'ab')))
      self._log_starts = {log.name: log.tell() for log in logs}
      self._process = subprocess.Popen(
        self._command(trials, self._stage),
        stdin=subprocess.DEVNULL,
        stdout=logs[-1],
        stderr=logs[-1],
        pass_fds=[log.fileno() for log in logs],
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
  for line in reversed(files.read_tail(path).splitlines(keepends=True)):
    if line.endswith('\n') and '"loss"' in line:
      try:
        row = untrusted.parse_json(line)
        return row['step'], row['loss']
      except (untrusted.Malformed, KeyError):
        # The first line may be the end of one.
        break
  return 0, None
