# SPDX-License-Identifier: Apache-2.0
"""The text of the progress bar and lines, by a clock that tests move."""

import contextlib
import os
import pty
import re
import struct
import sys
import threading
import types

import pytest

from moepeft.core import progress as progress_lib
from moepeft.core.progress import Pass, Progress, memory_bytes


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self) -> float:
    return self.now


def begin(steps, start=0):
  clock = Clock()
  return Progress(steps, start, clock, lambda: 1_340_000_000), clock


def last_line(capsys):
  return capsys.readouterr().out.splitlines()[-1]


def test_a_line_has_all_that_a_run_is_watched_for(capsys):
  progress, clock = begin(1000)
  clock.now += 20.0
  # 10 steps in 20 s; 990 are left, 1980 s: 33 minutes.
  rates = progress.update(10, 2.34567, examples=320, tokens=25_000)
  assert last_line(capsys) == (
    'step 10/1000  loss 2.3457  16.0 examples/s  1,250 tokens/s  ETA 33:00  '
    'mem 1.3 GB'
  )
  assert rates == {
    'steps_per_s': 0.5,
    'examples_per_s': 16.0,
    'tokens_per_s': 1250.0,
    'memory_bytes': 1_340_000_000,
  }


def test_compiling_saving_and_validating_are_not_timed(capsys):
  progress, clock = begin(100)
  clock.now += 500  # the first step is compiled
  progress.begin(1)
  clock.now += 9 * 2
  with progress.paused('validating'):
    clock.now += 300
  # Ten steps were seen and nine timed, 2 s each.
  rates = progress.update(10, 1.0, examples=70, tokens=700)
  assert rates['examples_per_s'] == pytest.approx(63 / 18)
  assert 'ETA 3:00' in last_line(capsys)  # 90 steps of 2 s
  with progress.paused('saving'):
    clock.now += 1000
  clock.now += 2 * 2
  rates = progress.update(12, 1.0, examples=14, tokens=140)
  assert rates['tokens_per_s'] == pytest.approx(140 / 4)
  assert 'ETA 2:56' in last_line(capsys)


def test_the_first_step_may_be_compiled_in_a_pause(capsys):
  progress, clock = begin(3)
  with progress.paused():
    clock.now += 50
    progress.begin(1)
    clock.now += 5
  clock.now += 4
  assert progress.update(2, 1.0, 2, 2)['tokens_per_s'] == pytest.approx(1 / 4)


def test_an_error_inside_a_pause_ends_the_pause():
  progress, clock = begin(9)
  with pytest.raises(KeyError):
    with progress.paused():
      clock.now += 5
      raise KeyError
  clock.now += 1
  assert progress.update(1, 1.0, 3, 3)['tokens_per_s'] == pytest.approx(3)


def test_the_time_left_after_a_resume_is_of_the_steps_left(capsys):
  progress, clock = begin(1000, start=900)
  clock.now += 30
  progress.begin(901)
  clock.now += 9 * 3
  progress.update(910, 1.0, 10, 10)
  # 90 steps of 3 s, not of the 910 that were done before.
  assert 'step 910/1000' in (line := last_line(capsys)) and 'ETA 4:30' in line


def test_the_time_left_follows_the_speed_of_late(capsys):
  progress, clock = begin(10_000)
  for step in range(1, 101):
    clock.now += 100 if step <= 50 else 1
    progress.update(step, 1.0, 1, 1)
  # 9,900 steps of 1 s; a mean over the run would say 50 times that.
  assert 'ETA 2:45:00' in last_line(capsys)


def test_one_step_alone_is_not_timed_and_says_so(capsys):
  progress, _ = begin(1)
  progress.begin(1)
  assert progress.update(1, 1.0, 5, 5)['examples_per_s'] == 0
  assert 'ETA ?' in last_line(capsys)


@pytest.mark.parametrize(
  ('loss', 'seconds', 'said'),
  [
    (0.0, 1, 'loss 0.0000'),
    (3.2e-6, 1, 'loss 3.20e-06'),
    (123456.0, 1, 'loss 1.23e+05'),
    # One example in 80 s is 0.0125 a second.
    (1.0, 80, '0.013 examples/s'),
    # 499,999 steps of 80 s are 462 days and 23 hours.
    (1.0, 80, 'ETA 462d 23h'),
  ],
)
def test_small_and_large_numbers_can_be_read(capsys, loss, seconds, said):
  progress, clock = begin(500_000)
  clock.now += seconds
  progress.update(1, loss, 1, 1000)
  line = last_line(capsys)
  assert said in line and len(line) <= 100


def test_a_long_fast_run_fits_a_hundred_columns(capsys):
  progress, clock = begin(500_000)
  clock.now += 1000
  progress.update(20_000, 0.1234, 640_000, 123_456_789)
  line = last_line(capsys)
  assert '640 examples/s  123,457 tokens/s  ETA 6:40:00' in line
  assert len(line) <= 100


def test_memory_is_that_of_this_process():
  before = memory_bytes()
  # More than all else that moves, and touched.
  ballast = bytearray(b'x' * 300_000_000)
  assert 250e6 < memory_bytes() - before < 400e6
  del ballast


def long_run():
  """Ten intervals of a long run, with an alarm and a pause to save."""
  clock = Clock()
  progress = Progress(500_000, 299_000, clock, lambda: 1_340_000_000)
  for step in range(299_100, 300_001, 100):
    clock.now += 50
    progress.update(step, 1.23456, 3200, 258_000)
    if step == 299_500:
      progress.print_line(
        'router alarm: decoder/layers/cross/o/molora, layer 0'
      )
      with progress.paused('saving'):
        clock.now += 100
  progress.close()


def short_run(clock):
  """Nine steps after a pass over examples and before a validation, each a
  tenth of a second and more by the clock of the terminal."""
  before = Pass(20, 'before training')
  for _ in range(4):
    before(5)
  before.close()
  progress = Progress(9, 0)
  progress.phase('compiling the first step')
  for step in range(1, 10):
    clock.now += 0.11
    progress.step(step)
    if step == 5:
      progress.update(step, 2.5, 10, 100)
  with progress.paused('validating', 7) as count:
    for _ in range(7):
      clock.now += 0.11
      count(1)
  progress.close()


@contextlib.contextmanager
def terminal(columns: int, monkeypatch):
  """A terminal of so many columns instead of the standard streams.

  Yields:
    A list, which afterwards has the output as its only element.
  """
  fcntl = pytest.importorskip('fcntl')
  termios = pytest.importorskip('termios')
  reader, writer = pty.openpty()
  # Nobody has sized a terminal of no columns.
  size = struct.pack('HHHH', 24 if columns else 0, columns, 0, 0)
  fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
  parts, output = [], []

  def read():
    # How Linux says that the other end is closed.
    with contextlib.suppress(OSError):
      while part := os.read(reader, 4096):
        parts.append(part)

  thread = threading.Thread(target=read)
  thread.start()
  with monkeypatch.context() as patch, open(writer, 'w') as stream:
    for name in ('COLUMNS', 'LINES'):
      patch.delenv(name, raising=False)
    for name in ('stdout', 'stderr', '__stdout__'):
      patch.setattr(sys, name, stream)
    yield output
  thread.join()
  os.close(reader)
  output.append(b''.join(parts).decode())


@pytest.mark.parametrize('columns', [80, 100, 120, 200])
def test_the_bar_fits_its_terminal_and_has_everything(columns, monkeypatch):
  with terminal(columns, monkeypatch) as output:
    long_run()
  states = [s.strip('\n') for s in re.split(r'[\r\n]', output[0])]
  bars = [s for s in states if '300000/500000' in s]
  # 200,000 steps at 2 a second are 27:46:40.
  for said in ('60%', 'loss 1.2346', '64.0 ex', '5,160 tok', 'ETA 27:46:40'):
    assert said in bars[-1], bars[-1]
  assert '1.3 GB' in bars[-1]
  assert max(map(len, states)) <= columns
  # The alarm stands on a line of its own, and the bar after it again.
  assert 'router alarm: decoder/layers/cross/o/molora, layer 0' in states
  assert any('saving' in s for s in states)


@pytest.mark.parametrize('columns', [0, 100])
def test_the_bar_moves_at_each_step_and_stands_in_each_phase(
  columns, monkeypatch
):
  clock = Clock()
  monkeypatch.setattr(
    progress_lib, 'time', types.SimpleNamespace(monotonic=clock)
  )
  # A terminal that nobody has sized has no columns; tqdm draws nothing there.
  with terminal(columns, monkeypatch) as output:
    short_run(clock)
  states = re.split(r'[\r\n]', output[0])
  for done in (0, 5, 10, 15, 20):
    assert any(f'| {done}/20' in s and 'before training' in s for s in states)
  for step in range(1, 10):
    assert any(f'| {step}/9' in s for s in states), step
  compiling = [s for s in states if 'compiling the first step' in s]
  assert compiling and all('| 0/9' in s for s in compiling)
  # Steps keep the figures of the last log.
  assert any('| 6/9' in s and 'loss 2.5000' in s for s in states)
  for done in range(1, 8):
    assert any(f'validating {done}/7' in s for s in states), done


def test_piped_there_are_plain_lines_only(capsys):
  long_run()
  done = capsys.readouterr()
  lines = done.out.splitlines()
  # Ten intervals and the alarm; no bar on either stream.
  assert len(lines) == 11 and done.err == ''
  assert lines[0].startswith('step 299100/500000  loss 1.2346  64.0 examples/s')
  assert '\r' not in done.out
