# SPDX-License-Identifier: Apache-2.0
"""The progress of a run: a bar on a terminal, plain lines elsewhere."""

import collections
import contextlib
import os
import resource
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
from tqdm import tqdm

# Intervals that the speed shown is a mean over.
_INTERVALS = 10
# Seconds between the plain lines of a pass.
_LINES = 10.0
# Of an objective's figures, those that there is room for.
_SHOWN = {'margins': 'margin', 'accuracies': 'acc'}
# From so many columns on a bar has whole words.
_WIDE = 110
# Of a terminal, for tqdm, which hides a bar where a terminal says 0 of itself.
_LINES_OF_TERMINAL = 24
# Seconds between two drawings of a bar that steps move.
_REDRAWN = 0.1


class Interval(NamedTuple):
  """The work between two updates; the seconds are of training alone."""

  steps: int
  examples: float
  tokens: float
  seconds: float


class Progress:
  """Steps done, throughput, time left and memory.

  The clock stands still while the run compiles (`begin`), saves or validates
  (`paused`), so throughput and the time left are those of training.
  """

  def __init__(
    self,
    steps: int,
    start: int,
    clock: Callable[[], float] = time.monotonic,
    memory: Callable[[], int] | None = None,
  ):
    """Args:
    steps: of the whole run.
    start: steps that were done before this process.
    clock: seconds.
    memory: bytes; by default `memory_bytes`.
    """
    self._steps, self._step = steps, start
    self._clock, self._memory = clock, memory or memory_bytes
    self._recent = collections.deque(maxlen=_INTERVALS)
    self._bar, self._phase, self._drawn = None, '', 0.0
    # Both: lines through a pipe (tee) would tear a bar on the same screen.
    if sys.stderr.isatty() and sys.stdout.isatty():
      self._bar = tqdm(
        total=steps,
        initial=start,
        ncols=_columns(),
        nrows=_LINES_OF_TERMINAL,
        bar_format='{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}',
      )
    self.begin(start)

  def begin(self, step: int) -> None:
    """Lets the clock begin at a step; what was before it is not timed."""
    self._timed_from, self._since = step, self._clock()

  def phase(self, name: str) -> None:
    """Says what is done before the first step; the next step ends it."""
    if self._bar is None:
      print(name, flush=True)
      return
    self._phase = name
    self._postfix(name)

  @contextlib.contextmanager
  def paused(
    self, why: str = '', total: int = 0
  ) -> Iterator[Callable[[int], None]]:
    """Stops the clock inside; a bar says why.

    Args:
      total: of what is done inside, where it is counted.

    Yields:
      A function that takes how much more of it is done.
    """
    began, done = self._clock(), 0
    if self._bar is not None:
      before = self._bar.postfix
      self._postfix(why)

    def count(more: int) -> None:
      nonlocal done
      done += more
      if self._bar is not None and self._due():
        self._postfix(f'{why} {done}/{total}')

    try:
      yield count
    finally:
      if self._bar is not None:
        self._postfix(before or '')
      # `begin` may have been called inside.
      self._since += self._clock() - max(began, self._since)

  def step(self, step: int) -> None:
    """Moves the bar; its figures stay those of the last `update`."""
    if self._bar is None or not self._due():
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
    figures: Mapping[str, float] = types.MappingProxyType({}),
  ) -> dict[str, float]:
    """Shows the state at a step.

    Args:
      examples, tokens: seen since the last call.
      figures: what an objective tells; those in _SHOWN are shown.

    Returns:
      {'steps_per_s', 'examples_per_s', 'tokens_per_s'} since the last call,
      and 'memory_bytes'.
    """
    now, memory = self._clock(), self._memory()
    # Of what was seen, as much as falls into the time: not the first step.
    timed = step - self._timed_from
    share = timed / max(step - self._step, 1)
    last = Interval(timed, share * examples, share * tokens, now - self._since)
    if timed:
      self._recent.append(last)
    self._show(step, loss, memory, figures)
    self._step = step
    self.begin(step)
    return {
      'steps_per_s': last.steps / max(last.seconds, 1e-9),
      'examples_per_s': last.examples / max(last.seconds, 1e-9),
      'tokens_per_s': last.tokens / max(last.seconds, 1e-9),
      'memory_bytes': memory,
    }

  def print_line(self, line: str) -> None:
    """Prints a line without tearing the bar."""
    if self._bar is not None:
      self._bar.write(line)
    else:
      print(line, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _show(
    self, step: int, loss: float, memory: int, figures: Mapping[str, float]
  ) -> None:
    wide = self._bar is None or _columns() >= _WIDE
    parts = [f'loss {_loss(loss)}']
    parts += [
      f'{word} {figures[key]:.3f}'
      for key, word in _SHOWN.items()
      if key in figures
    ]
    parts += self._speed(step, wide)
    parts.append(f'mem {_size(memory)}' if wide else _size(memory))
    if self._bar is None:
      print(f'step {step}/{self._steps}', *parts, sep='  ', flush=True)
      return
    gap = '  ' if wide else ' '
    self._bar.set_postfix_str(gap.join(parts), refresh=False)
    # Not `update`: tqdm would wait for its own clock before it draws.
    self._bar.n, self._phase = step, ''
    self._refresh()

  def _postfix(self, text: str) -> None:
    self._bar.set_postfix_str(text, refresh=False)
    self._refresh()

  def _refresh(self) -> None:
    self._drawn = time.monotonic()
    self._bar.ncols = _columns()
    self._bar.refresh()

  def _due(self) -> bool:
    """Whether the bar may be drawn anew: steps can take microseconds."""
    return time.monotonic() - self._drawn > _REDRAWN

  def _speed(self, step: int, wide: bool) -> list[str]:
    """The speed of the latest intervals: a machine's speed may change."""
    if not self._recent:
      return ['ETA ?']
    steps, examples, tokens, seconds = map(sum, zip(*self._recent, strict=True))
    seconds = max(seconds, 1e-9)
    words = ('examples/s', 'tokens/s') if wide else ('ex/s', 'tok/s')
    return [
      f'{_rate(examples / seconds)} {words[0]}',
      f'{_rate(tokens / seconds)} {words[1]}',
      f'ETA {_clock((self._steps - step) * seconds / steps)}',
    ]


class Pass:
  """The progress of a pass over examples, on stderr; called with its steps.

  The speed is that of the whole pass, and the time to compile counts.
  """

  def __init__(
    self, total: int, label: str, clock: Callable[[], float] = time.monotonic
  ):
    """Args:
    total: examples.
    label: names the pass, in a word or two.
    clock: seconds.
    """
    self._total, self._label, self._clock = total, label, clock
    self._done, self._began = 0, clock()
    self._next_line = 0.0
    self._bar = None
    if total and sys.stderr.isatty():
      self._bar = tqdm(
        total=total,
        desc=label,
        ncols=_columns(),
        nrows=_LINES_OF_TERMINAL,
        bar_format='{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}'
        '{postfix}',
      )
    elif total:
      # The first batch is compiled before it is run, which may take minutes.
      self._line(f'{label} 0/{total}')

  def __call__(self, done: int) -> None:
    """Shows that so many more examples are done."""
    self._done += done
    seconds = max(self._clock() - self._began, 1e-9)
    rate = self._done / seconds
    parts = [f'{_rate(rate)} examples/s']
    if rate:
      parts.append(f'ETA {_clock((self._total - self._done) / rate)}')
    if self._bar is not None:
      self._bar.set_postfix_str('  '.join(parts), refresh=False)
      self._bar.n, self._bar.ncols = self._done, _columns()
      self._bar.refresh()
    elif seconds >= self._next_line or self._done >= self._total:
      self._next_line = seconds + _LINES
      self._line(f'{self._label} {self._done}/{self._total}', *parts)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _line(self, *parts: str) -> None:
    print(*parts, sep='  ', file=sys.stderr, flush=True)


def _columns() -> int:
  """Columns of the terminal; 80 where it tells 0, as one without a size does,
  on which tqdm would draw nothing."""
  return shutil.get_terminal_size().columns


def memory_bytes() -> int:
  """The most that a device has had in use, or what the process has now.

  The first on accelerators, where memory between steps says little; the
  second, the resident set, on CPU.
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s['peak_bytes_in_use'] for s in stats if s]
  return max(peaks) if peaks else _resident()


def _resident() -> int:
  try:
    with open('/proc/self/statm') as f:
      return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except OSError:
    # Not Linux: the most so far, in bytes on macOS.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == 'darwin' else 1024 * most


def _loss(value: float) -> str:
  small_or_large = value and not 0.001 <= abs(value) < 10_000
  return f'{value:.2e}' if small_or_large else f'{value:.4f}'


def _rate(value: float) -> str:
  if value >= 100:
    return f'{value:,.0f}'
  return f'{value:.1f}' if value >= 1 else f'{value:.2g}'


def _size(count: int) -> str:
  if count >= 1e9:
    return f'{count / 1e9:.1f} GB'
  return f'{count / 1e6:.0f} MB'


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours >= 48:
    return f'{hours // 24}d {hours % 24}h'
  return (
    f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
  )
