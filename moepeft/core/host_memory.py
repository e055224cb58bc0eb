# SPDX-License-Identifier: Apache-2.0
"""Tunes malloc for computation on CPU, and bounds the memory that it keeps.

XLA allocates a program's temporary buffer with malloc at every call. glibc maps
a block of that size and unmaps it afterwards, so every step faults in all of
its pages: 1.3 times the time (benchmarks/keep_pages.py). One arena that is
never trimmed keeps the pages. But a smaller allocation inside a freed buffer
leaves too little room for the next buffer, which gets new pages. So the heap
fragments, and in time the process keeps several buffers and uses one.
"""

import ctypes
import os
from collections.abc import Callable

# Constants of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1
# Linux's mman.h, and the size of its huge pages on x86 and ARM.
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2**21
_ACCELERATORS = ('/dev/nvidiactl', '/dev/kfd', '/dev/accel0', '/dev/vfio/0')
# The maximum of resident memory, relative to that after the first step. With
# 1.5, DPO on a model of 135 M parameters grew from 8.6 GB to 15 GB.
_MAX_GROWTH = 1.25


def tune_malloc() -> bool:
  """Sets glibc's malloc to keep the memory that a step on CPU frees.

  Call it before JAX starts its threads, because each would get an arena.

  Returns:
    Whether the options are set: False without glibc or with an accelerator.
  """
  if any(map(os.path.exists, _ACCELERATORS)):
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
  if mallopt is None or any(mallopt(*pair) != 1 for pair in settings):
    return False
  _advise_huge_pages()
  return True


def _advise_huge_pages() -> None:
  """Asks Linux for pages of 2 MB wherever the heap grows to.

  The heap's addresses are reserved by an allocation that is freed at once; the
  options above keep them in the heap. Where the system refuses, pages stay
  small.
  """
  libc = ctypes.CDLL(None)
  libc.malloc.restype = ctypes.c_void_p
  # Linux refuses as much as there is.
  size = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') * 9 // 10
  address = libc.malloc(ctypes.c_size_t(size))
  if address:
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    length = ctypes.c_size_t(size - _HUGE_PAGE)
    libc.madvise(ctypes.c_void_p(start), length, _MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(address))


def trim() -> None:
  """Returns free pages to the system; does nothing without glibc."""
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if malloc_trim is not None:
    malloc_trim(0)
    _advise_huge_pages()


def resident() -> int:
  """The resident set of the process in bytes; 0 if unknown (not Linux)."""
  try:
    with open('/proc/self/statm') as f:
      return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except OSError:
    return 0


class Bound:
  """Returns memory to the system when the resident set has grown too far.

  The next step is slower, because it faults its pages in again.
  """

  def __init__(
    self,
    resident_bytes: Callable[[], int] = resident,
    trim: Callable[[], None] = trim,
  ):
    self._resident_bytes, self._trim = resident_bytes, trim
    self._max_bytes: float | None = None

  def begin(self) -> None:
    """Sets the bound; call it after the first step."""
    self._max_bytes = _MAX_GROWTH * self._resident_bytes()

  def check(self) -> bool:
    """Call it after every step; returns whether it released memory."""
    if self._max_bytes is None or self._resident_bytes() <= self._max_bytes:
      return False
    self._trim()
    return True
