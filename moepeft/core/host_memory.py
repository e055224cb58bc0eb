# SPDX-License-Identifier: Apache-2.0
"""The memory of a process that computes on CPU: what is kept, what goes back.

XLA takes a program's temporary buffer from malloc at every call. glibc maps a
block of that size anew and unmaps it after, so every step faults in all of its
pages: 1.3 times the time (benchmarks/keep_pages.py). One arena that is never
trimmed keeps them. But whatever else is taken out of a freed buffer leaves too
little of it for the next, which then lies beside it: in a while the process
holds several buffers, of which one is in use.
"""

import ctypes
import os
from collections.abc import Callable

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1
_ACCELERATORS = ('/dev/nvidiactl', '/dev/kfd', '/dev/accel0', '/dev/vfio/0')
# What a process may hold over what it held after its first step. With 1.5, DPO
# on a model of 135 M parameters went from 8.6 GB to 15.
_MOST = 1.25


def tune_malloc() -> bool:
  """Sets glibc's malloc to keep the memory that a step on CPU frees.

  Call it before JAX starts its threads, which would get arenas of their own.

  Returns:
    Whether the options are set: not without glibc or with an accelerator.
  """
  if any(map(os.path.exists, _ACCELERATORS)):
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
  return mallopt is not None and all(mallopt(*pair) == 1 for pair in settings)


def trim() -> None:
  """Returns free pages to the system; does nothing without glibc."""
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if malloc_trim is not None:
    malloc_trim(0)


def resident() -> int:
  """Bytes of memory that the process holds; 0 where the system tells none."""
  try:
    with open('/proc/self/statm') as f:
      return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except OSError:
    return 0


class Bound:
  """Gives memory back whenever a process holds much more than it needs.

  A step after that is slower by the pages that it faults in.
  """

  def __init__(
    self,
    resident_bytes: Callable[[], int] = resident,
    trim: Callable[[], None] = trim,
  ):
    self._resident_bytes, self._trim = resident_bytes, trim
    self._most: float | None = None

  def begin(self) -> None:
    """To be called when the first step is done: it holds what a step needs."""
    self._most = _MOST * self._resident_bytes()

  def check(self) -> bool:
    """To be called after every step; whether memory was given back."""
    if self._most is None or self._resident_bytes() <= self._most:
      return False
    self._trim()
    return True
