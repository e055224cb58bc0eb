# SPDX-License-Identifier: Apache-2.0
"""The memory that a process which computes on CPU keeps."""

import pathlib
import subprocess
import sys

import pytest

from moepeft.core.host_memory import Bound

# 2^26 floats are 512 MB. What is made beside a buffer lies above it and stays,
# and so does what is made after, in the hole: the next does not fit there.
STORY = """
import numpy as np
from moepeft.core import host_memory as pages
assert pages.tune_malloc()
held = []
def step():
  buffer = np.ones(2**26)
  held.append(np.ones(2**17))
  del buffer
  held.append(np.ones(2**17))
step()
kept, bound = pages.resident(), pages.Bound()
bound.begin()
assert not bound.check()
step()
step()
before = pages.resident()
given = bound.check()
print(kept, before, given, pages.resident())
"""


# Bytes, because NumPy asks for huge pages itself.
HUGE_PAGES = """
from moepeft.core import host_memory
assert host_memory.tune_malloc()
def huge():
  with open('/proc/self/smaps_rollup') as f:
    return [int(l.split()[1]) for l in f if l.startswith('AnonHugePages')][0]
small, text = huge(), b'x' * 2**28
first = huge() - small
del text
host_memory.trim()
trimmed = huge()
text = b'x' * 2**28
print(first, trimmed - small, huge() - small)
"""


class Process:
  def __init__(self, held):
    self.held, self.given = held, 0

  def give_back(self):
    self.given += 1


def test_nothing_is_given_back_up_to_a_quarter_more_than_after_one_step():
  process = Process(12)
  bound = Bound(lambda: process.held, process.give_back)
  bound.begin()
  process.held = 15
  # 1.25 times 12.
  assert not bound.check() and process.given == 0
  process.held = 16
  assert bound.check() and process.given == 1


def test_before_the_first_step_nothing_is_given_back():
  process = Process(1 << 40)
  assert not Bound(lambda: process.held, process.give_back).check()
  assert process.given == 0


@pytest.mark.skipif(sys.platform != 'linux', reason='needs glibc on Linux')
def test_holes_of_a_real_process_go_back_and_a_buffer_is_kept():
  done = subprocess.run(
    [sys.executable, '-c', STORY], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  remaining, before, given, after = done.stdout.split()
  assert int(remaining) > 2**29
  assert int(before) > 1.5 * int(remaining) and given == 'True'
  assert int(after) < 2**29


def have_huge_pages():
  path = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
  return path.exists() and '[never]' not in path.read_text()


@pytest.mark.skipif(not have_huge_pages(), reason='needs huge pages of Linux')
def test_the_heap_has_huge_pages_before_and_after_a_trim():
  done = subprocess.run(
    [sys.executable, '-c', HUGE_PAGES], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  first, trimmed, again = map(int, done.stdout.split())
  # In kB, of 256 MB; the kernel may lack a few whole pages of 2 MB.
  assert first > 200_000 and again > 200_000 and trimmed < 50_000
