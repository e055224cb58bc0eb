# SPDX-License-Identifier: Apache-2.0
"""Shows the progress of a run: a bar on a terminal, else plain lines."""

import collections
import contextlib
import resource
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
from tqdm import tqdm

from moepeft.core import host_memory

# The displayed speed is the mean over so many intervals.
_INTERVALS = 10
# Seconds between the plain lines of a pass.
_LINE_INTERVAL = 10.0
# The objective's metrics to display, with their labels.
_METRIC_LABELS = {'margins': 'margin', 'accuracies': 'acc'}
# From so many columns on, a bar has no abbreviations.
_WIDE = 110
# Set for tqdm, which hides its bar if the terminal reports 0 lines.
_TERMINAL_LINES = 24
# The least number of seconds between two refreshes of a bar.
_REFRESH_INTERVAL = 0.1


class Interval(NamedTuple):
  """The work between two updates; the seconds are training time only."""

  steps: int
  examples: float
  tokens: float
  seconds: float


class Progress:
  """Shows the steps done, the throughput, the time left and the memory.

  Throughput and time left are those of training: the clock excludes compilation
  (`begin`), saving and validation (`paused`).
  """

  def __init__(
    self,
    steps: int,
    start: int,
    clock: Callable[[], float] = time.monotonic,
    memory: Callable[[], int] | None = None,
  ):
    """Args:
    steps: the number of steps in the run.
    start: the number of steps before this process.
    clock: returns seconds.
    memory: returns bytes; by default `memory_bytes`.
    """
    self._steps, self._step = steps, start
    self._clock, self._memory = clock, memory or memory_bytes
    self._recent = collections.deque(maxlen=_INTERVALS)
    self._bar, self._phase, self._refreshed_at = None, '', 0.0
    # Both, because lines through a pipe (tee) would break a bar on the screen.
    if sys.stderr.isatty() and sys.stdout.isatty():
      self._bar = tqdm(
        total=steps,
        initial=start,
        ncols=_columns(),
        nrows=_TERMINAL_LINES,
        bar_format='{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}',
      )
    self.begin(start)

  def begin(self, step: int) -> None:
    """Starts the clock at a step; earlier steps are not timed."""
    self._start_step, self._start_time = step, self._clock()

  def phase(self, name: str) -> None:
    """Shows a phase before the first step; the next step ends it."""
    if self._bar is None:
      print(name, flush=True)
      return
    self._phase = name
    self._set_postfix(name)

  @contextlib.contextmanager
  def paused(
    self, label: str = '', total: int = 0
  ) -> Iterator[Callable[[int], None]]:
    """Stops the clock inside the block; a bar shows the label.

    Args:
      total: the number of items that the block processes, if it counts them.

    Yields:
      A function that adds a number of processed items.
    """
    pause_start, done = self._clock(), 0
    if self._bar is not None:
      old_postfix = self._bar.postfix
      self._set_postfix(label)

    def add(count: int) -> None:
      nonlocal done
      done += count
      if self._bar is not None and self._may_refresh():
        self._set_postfix(f'{label} {done}/{total}')

    try:
      yield add
    finally:
      if self._bar is not None:
        self._set_postfix(old_postfix or '')
      # The block may have called `begin`.
      self._start_time += self._clock() - max(pause_start, self._start_time)

  def step(self, step: int) -> None:
    """Moves the bar; its text stays that of the last `update`."""
    if self._bar is None or not self._may_refresh():
      return
    self._bar.n = step
    if self._phase:
      self._phase = ''
      self._bar.set_postfix_str('', refresh=False)
    self._refresh()

  def update(
    self,
    step: int,
    loss: float,
    examples: int,
    tokens: int,
    metrics: Mapping[str, float] = types.MappingProxyType({}),
  ) -> dict[str, float]:
    """Shows the state at a step.

    Args:
      examples, tokens: the numbers since the last call.
      metrics: the objective's metrics; those in _METRIC_LABELS are shown.

    Returns:
      {'steps_per_s', 'examples_per_s', 'tokens_per_s'} since the last call,
      and 'memory_bytes'.
    """
    now, memory = self._clock(), self._memory()
    # The steps before `begin` are not timed, so their examples do not count.
    steps = step - self._start_step
    share = steps / max(step - self._step, 1)
    last = Interval(
      steps, share * examples, share * tokens, now - self._start_time
    )
    if steps:
      self._recent.append(last)
    self._show(step, loss, memory, metrics)
    self._step = step
    self.begin(step)
    return {
      'steps_per_s': last.steps / max(last.seconds, 1e-9),
      'examples_per_s': last.examples / max(last.seconds, 1e-9),
      'tokens_per_s': last.tokens / max(last.seconds, 1e-9),
      'memory_bytes': memory,
    }

  def print_line(self, line: str) -> None:
    """Prints a line above the bar, if there is one."""
    if self._bar is not None:
      self._bar.write(line)
    else:
      print(line, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _show(
    self, step: int, loss: float, memory: int, metrics: Mapping[str, float]
  ) -> None:
    wide = self._bar is None or _columns() >= _WIDE
    parts = [f'loss {_format_loss(loss)}']
    parts += [
      f'{label} {metrics[key]:.3f}'
      for key, label in _METRIC_LABELS.items()
      if key in metrics
    ]
    parts += self._speed(step, wide)
    parts.append(
      f'mem {_format_size(memory)}' if wide else _format_size(memory)
    )
    if self._bar is None:
      print(f'step {step}/{self._steps}', *parts, sep='  ', flush=True)
      return
    gap = '  ' if wide else ' '
    self._bar.set_postfix_str(gap.join(parts), refresh=False)
    # Not `tqdm.update`, which limits the rate of refreshes by its own clock.
    self._bar.n, self._phase = step, ''
    self._refresh()

  def _set_postfix(self, text: str) -> None:
    self._bar.set_postfix_str(text, refresh=False)
    self._refresh()

  def _refresh(self) -> None:
    self._refreshed_at = time.monotonic()
    self._bar.ncols = _columns()
    self._bar.refresh()

  def _may_refresh(self) -> bool:
    """Limits the rate of refreshes, because steps can take microseconds."""
    return time.monotonic() - self._refreshed_at > _REFRESH_INTERVAL

  def _speed(self, step: int, wide: bool) -> list[str]:
    """The mean speed over the latest intervals, and the time left."""
    if not self._recent:
      return ['ETA ?']
    steps, examples, tokens, seconds = map(sum, zip(*self._recent, strict=True))
    seconds = max(seconds, 1e-9)
    units = ('examples/s', 'tokens/s') if wide else ('ex/s', 'tok/s')
    return [
      f'{_format_rate(examples / seconds)} {units[0]}',
      f'{_format_rate(tokens / seconds)} {units[1]}',
      f'ETA {format_seconds((self._steps - step) * seconds / steps)}',
    ]


class Pass:
  """Shows the progress of a pass over examples on stderr.

  The speed is the mean over the whole pass, including compilation.
  """

  def __init__(
    self, total: int, label: str, clock: Callable[[], float] = time.monotonic
  ):
    """Args:
    total: the number of examples.
    label: a short name of the pass.
    clock: returns seconds.
    """
    self._total, self._label, self._clock = total, label, clock
    self._done, self._start_time = 0, clock()
    self._next_line = 0.0
    self._bar = None
    if total and sys.stderr.isatty():
      self._bar = tqdm(
        total=total,
        desc=label,
        ncols=_columns(),
        nrows=_TERMINAL_LINES,
        bar_format='{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}'
        '{postfix}',
      )
    elif total:
      # Compilation may take minutes before the first batch.
      self._print_line(f'{label} 0/{total}')

  def __call__(self, count: int) -> None:
    """Adds a number of processed examples."""
    self._done += count
    seconds = max(self._clock() - self._start_time, 1e-9)
    rate = self._done / seconds
    parts = [f'{_format_rate(rate)} examples/s']
    if rate:
      parts.append(f'ETA {format_seconds((self._total - self._done) / rate)}')
    if self._bar is not None:
      self._bar.set_postfix_str('  '.join(parts), refresh=False)
      self._bar.n, self._bar.ncols = self._done, _columns()
      self._bar.refresh()
    elif seconds >= self._next_line or self._done >= self._total:
      self._next_line = seconds + _LINE_INTERVAL
      self._print_line(f'{self._label} {self._done}/{self._total}', *parts)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _print_line(self, *parts: str) -> None:
    print(*parts, sep='  ', file=sys.stderr, flush=True)


def _columns() -> int:
  """The terminal's columns, or 80 if it reports 0, which hides a tqdm bar."""
  return shutil.get_terminal_size().columns


def memory_bytes() -> int:
  """The peak memory of an accelerator, or the resident set on CPU.

  An accelerator's memory between two steps does not include the activations.
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s['peak_bytes_in_use'] for s in stats if s]
  if peaks:
    return max(peaks)
  # Not Linux: the peak, in bytes on macOS, else in kilobytes.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  unit = 1 if sys.platform == 'darwin' else 1024
  return host_memory.resident() or unit * peak


def _format_loss(value: float) -> str:
  is_fixed = not value or 0.001 <= abs(value) < 10_000
  return f'{value:.4f}' if is_fixed else f'{value:.2e}'


def _format_rate(value: float) -> str:
  if value >= 100:
    return f'{value:,.0f}'
  return f'{value:.1f}' if value >= 1 else f'{value:.2g}'


def _format_size(count: int) -> str:
  if count >= 1e9:
    return f'{count / 1e9:.1f} GB'
  return f'{count / 1e6:.0f} MB'


def format_seconds(seconds: float) -> str:
  """'1:05', '2:00:00' or '3d 4h'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours >= 48:
    return f'{hours // 24}d {hours % 24}h'
  return (
    f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
  )
