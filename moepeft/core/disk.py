# SPDX-License-Identifier: Apache-2.0
"""Recognition of a full disk in an error, and the sentence that replaces it."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT)
# The texts of the same errors in exceptions of C++ libraries.
_WORDS = tuple(os.strerror(code) for code in _FULL)


class FullDisk(ValueError):
  """A full disk, reported by a sentence that says what to do."""


def is_full(error: BaseException | None) -> bool:
  """Whether an error, or what it was raised from, says that a disk is full."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return True
    if any(word in str(error) for word in _WORDS):
      return True
    error = error.__cause__ or error.__context__
  return False


@contextlib.contextmanager
def tell_full_disk(
  path: str, latest: Callable[[], int | None]
) -> Iterator[None]:
  """Turns a full disk, met inside, into a sentence that says what to do.

  Args:
    path: what is written to.
    latest: gives the step of the latest whole checkpoint, if there is one.

  Raises:
    ValueError: the disk is full; other errors pass.
  """
  try:
    yield
  except Exception as e:
    if not is_full(e) or isinstance(e, FullDisk):
      raise
    raise FullDisk(
      f'the disk of {path} is full; free some space, then the same command '
      f'{next_start(latest())}'
    ) from e


def next_start(step: int | None) -> str:
  """The step that the same command starts from, in words."""
  if step is None:
    return 'begins anew, as there is no whole checkpoint yet'
  return f'goes on from the checkpoint of step {step}'
