# SPDX-License-Identifier: Apache-2.0
"""Shows a sweep: running trials as a live table on a terminal, else lines."""

import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.core import terminal
from moepeft.core.progress import format_seconds
from moepeft.runs.run import Run
from moepeft.sweeps import vmap_groups
from moepeft.sweeps.attempt import Attempt, last_metrics
from moepeft.sweeps.results import FAILED, FINISHED, UNFINISHED
from moepeft.sweeps.trials import Trial

_REFRESH_SECONDS = 0.5
# Moves the cursor up by so many lines, and clears what is below.
_UP_AND_CLEAR = '\x1b[{}F\x1b[J'


class Display:
  """Lines for trials that start and end; on a terminal, also a live table."""

  def __init__(self, runs: Mapping[str, Run], jobs: int):
    """
    Args:
      runs: {name: run} of all trials.
      jobs: the number of trials at once, of all processes.
    """
    self._runs, self._jobs = runs, jobs
    self._width = max(map(len, runs))
    self._is_live = sys.stdout.isatty()
    self._table_lines, self._refreshed_at = 0, 0.0
    self._durations: list[float] = []

  def start(self, trials: Sequence[Trial], shows_groups: bool = False) -> None:
    """Shows the start of trials that a process runs.

    Args:
      shows_groups: whether to say what is trained together, and what alone.
    """
    group_text = ''
    if len(trials) > 1:
      group_text = f', trained together with {len(trials) - 1} more'
    elif shows_groups:
      why = vmap_groups.why_alone(trials[0])
      group_text = f', alone{why and f": {why}"}'
    self._clear()
    for trial in trials:
      if group_text or not self._is_live:
        terminal.show(f'{trial.name:{self._width}}  started{group_text}')

  def end(self, row: Mapping[str, Any], seconds: float) -> None:
    """Shows the end of a trial, which took so many seconds."""
    if row['status'] == UNFINISHED:
      # It is trained, and not evaluated yet.
      return
    if row['status'] == FINISHED:
      self._durations.append(seconds)
    self._clear()
    terminal.show(f'{row["name"]:{self._width}}  {describe(row)}')

  def update(self, active: Sequence[Attempt], remaining: int) -> None:
    """Shows the running trials.

    Args:
      remaining: the number of trials to run, with those that are running.
    """
    now = time.monotonic()
    if not self._is_live or now - self._refreshed_at < _REFRESH_SECONDS:
      return
    self._refreshed_at = now
    columns, rows = shutil.get_terminal_size()
    running = [(a.seconds, trial) for a in active for trial in a.trials]
    states = [self._state(seconds, trial) for seconds, trial in running]
    left = time_left(
      self._durations, [state[:2] for state in states], remaining, self._jobs
    )
    eta = '?' if left is None else format_seconds(left)
    lines = [f'{len(running)} running, {remaining} to go, ETA {eta}']
    lines += [
      f'  {trial.name:{self._width}}  {text}  {format_seconds(seconds)}'
      for (seconds, trial), (_, _, text) in zip(running, states, strict=True)
    ]
    self._clear()
    # A line that wraps would be two for the cursor.
    lines = [terminal.visible(line)[: columns - 1] for line in lines]
    lines = lines[: max(rows - 1, 1)]
    print('\n'.join(lines), flush=True)
    self._table_lines = len(lines)

  def close(self) -> None:
    self._clear()

  def _state(self, seconds: float, trial: Trial) -> tuple[float, float, str]:
    """(seconds, share of the steps that are done, text) of a running trial."""
    steps = trial.config.steps
    step, loss = last_metrics(self._runs[trial.name].metrics_file)
    text = f'step {step}/{steps}'
    if loss is not None:
      text += f'  loss {loss:.4f}'
    return seconds, step / steps, text

  def _clear(self) -> None:
    if self._table_lines:
      print(_UP_AND_CLEAR.format(self._table_lines), end='', flush=True)
      self._table_lines = 0


def describe(row: Mapping[str, Any]) -> str:
  """The result of a trial in words."""
  if row['status'] == FAILED:
    return f'failed: {row["error"]}'
  parts = [
    f'validation {name} {value:.4f}'
    for name, value in row.get('validation', {}).items()
    if value is not None
  ]
  parts += [
    f'{name} {value:.3f}' for name, value in row.get('test', {}).items()
  ]
  if 'parameters' in row:
    parts.append(f'{row["parameters"]:,} parameters')
  if 'experts' in row:
    parts.append(f'{row["dead_experts"]} of {row["experts"]} experts dead')
  if 'seconds' in row:
    parts.append(format_seconds(row['seconds']))
  return ', '.join(parts) or row['status']


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """The cells of a table of rows; columns without any entry are left out."""
  columns: dict[str, list[str]] = {}
  for i, row in enumerate(rows):
    cells = {'trial': row['name'], 'status': row['status']}
    cells |= {
      f'validation {name}': f'{value:.4f}'
      for name, value in row.get('validation', {}).items()
      if value is not None
    }
    cells |= {k: f'{v:.3f}' for k, v in row.get('test', {}).items()}
    if 'parameters' in row:
      cells['parameters'] = f'{row["parameters"]:,}'
    if 'experts' in row:
      cells['dead'] = f'{row["dead_experts"]}/{row["experts"]}'
    if 'seconds' in row:
      cells['time'] = format_seconds(row['seconds'])
    if row.get('chosen'):
      cells['chosen'] = 'yes'
    for name, cell in cells.items():
      columns.setdefault(name, ['-'] * len(rows))[i] = cell
  return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def time_left(
  durations: Sequence[float],
  running: Sequence[tuple[float, float]],
  remaining: int,
  jobs: int,
) -> float | None:
  """The seconds until all trials have ended; None before that is known.

  Args:
    durations: seconds of trials that have ended.
    running: (seconds so far, share of the steps that are done).
    remaining: the number of trials that have not ended, with the running ones.
    jobs: the number of trials at once.
  """
  rates = [seconds / share for seconds, share in running if share > 0]
  if not durations and not rates:
    return None
  mean = statistics.fmean(durations or rates)
  left = mean * (remaining - len(running))
  left += sum(max(mean - seconds, 0.0) for seconds, _ in running)
  return left / max(min(jobs, remaining), 1)
