# SPDX-License-Identifier: Apache-2.0
"""Runs the trials of a sweep as processes, several at once."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from moepeft.sweeps import results, selection, vmap_groups
from moepeft.sweeps.attempt import Attempt, Command
from moepeft.sweeps.directory import TRAIN, SweepDirectory
from moepeft.sweeps.display import Display
from moepeft.sweeps.trials import Trial

_POLL_SECONDS = 0.1


class Sweep:
  """The trials of a sweep and their rows.

  Attributes:
    rows: {name: row of `results`}, in the order of the trials.
  """

  def __init__(
    self,
    directory: SweepDirectory,
    trials: Sequence[Trial],
    keys: Sequence[str] = (),
  ):
    """
    Args:
      keys: those whose values are chosen; see `selection`.
    """
    self._directory, self._trials, self._keys = directory, trials, keys
    self.rows = {t.name: results.read_row(directory, t) for t in trials}

  def forget_failures(self) -> None:
    """Lets failed trials be run again."""
    for trial in self._trials:
      if self.rows[trial.name]['status'] == results.FAILED:
        self._directory.forget_failure(trial)
        self.read(trial)

  def read(self, trial: Trial) -> dict[str, Any]:
    """Reads the row of a trial from its run."""
    self.rows[trial.name] = results.read_row(self._directory, trial)
    return self.rows[trial.name]

  def choices(self) -> dict[str, selection.Choice]:
    return selection.choose(self._trials, self.rows, self._keys)

  def to_run(self) -> list[Trial]:
    """The trials that can be run now: not ended, and not waiting for others."""
    choices = self.choices()
    return [
      trial
      for trial in self._trials
      if choices[trial.name].runs
      and self.rows[trial.name]['status'] == results.UNFINISHED
    ]

  def remaining(self) -> int:
    """The number of trials that are still to be run, at the end of all."""
    unfinished = [
      trial
      for trial in self._trials
      if self.rows[trial.name]['status'] == results.UNFINISHED
    ]
    return selection.count_runs(unfinished, self.choices(), self._keys)

  def final_rows(self) -> list[dict[str, Any]]:
    """The rows with the choices of --select."""
    rows, choices = [], self.choices()
    for name, row in self.rows.items():
      choice = choices[name]
      if choice.runs is False and row['status'] == results.UNFINISHED:
        row = row | {'status': results.LEFT_OUT}
      if self._keys:
        row = row | {'chosen': choice.chosen, 'why': choice.why}
      rows.append(row)
    return rows

  def write(self) -> None:
    results.write(self._directory.results_file, self.final_rows())


def run(
  sweep: Sweep,
  directory: SweepDirectory,
  command: Command,
  jobs: int,
  display: Display,
  vmap: int = 1,
) -> None:
  """Runs all trials that have not ended; a failure is a row and ends no other.

  Args:
    command: see `Attempt`.
    jobs: the number of processes at once.
    vmap: the number of trials that a process may train together.

  Raises:
    KeyboardInterrupt: as any error, after the running trials are saved.
  """
  active: list[Attempt] = []
  sweep.write()
  try:
    while True:
      ended = [attempt for attempt in active if attempt.is_done()]
      for attempt in ended:
        active.remove(attempt)
        for trial in attempt.trials:
          row = record(sweep, directory, attempt, trial)
          display.end(row, attempt.seconds)
        sweep.write()
      if ended or not active:
        running = {trial.name for a in active for trial in a.trials}
        ready = [t for t in sweep.to_run() if t.name not in running]
        for trials in _groups(directory, ready, vmap)[: jobs - len(active)]:
          active.append(Attempt(directory, trials, command))
          display.start(trials, vmap > 1)
        remaining = sweep.remaining()
      if not active:
        break
      display.update(active, remaining)
      time.sleep(_POLL_SECONDS)
  except BaseException:
    stop(active)
    raise
  finally:
    display.close()


def _groups(
  directory: SweepDirectory, trials: Sequence[Trial], most: int
) -> list[list[Trial]]:
  """The trials of each process to start."""
  trained = [t for t in trials if directory.stage(t) != TRAIN]
  new = [t for t in trials if directory.stage(t) == TRAIN]
  groups = vmap_groups.group(new, most) if most > 1 else [[t] for t in new]
  return [[t] for t in trained] + groups


def record(
  sweep: Sweep, directory: SweepDirectory, attempt: Attempt, trial: Trial
) -> dict[str, Any]:
  """The row of a trial whose attempt is done; stores its error, if any."""
  error = attempt.error(trial)
  if error:
    directory.write_failure(trial, error)
  return sweep.read(trial)


def stop(active: Sequence[Attempt]) -> None:
  """Ends the running trials, each after the step that it is in."""
  print(f'\nsaving {len(active)} running trials', file=sys.stderr, flush=True)
  try:
    for attempt in active:
      attempt.interrupt()
    for attempt in active:
      attempt.wait()
  except KeyboardInterrupt:
    for attempt in active:
      attempt.kill()
    raise
