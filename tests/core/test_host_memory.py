# SPDX-License-Identifier: Apache-2.0
"""The memory that a process which computes on CPU keeps."""

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
