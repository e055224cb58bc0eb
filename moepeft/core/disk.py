# SPDX-License-Identifier: Apache-2.0
"""Detects a full disk in an error, and reports it in one sentence."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

_FULL_CODES = (errno.ENOSPC, errno.EDQUOT)
# The texts of these errors in exceptions of C++ libraries.
_WORDS = tuple(os.strerror(code) for code in _FULL_CODES)


class FullDisk(ValueError):
  """A full disk, with a message that says what to do."""


def is_full(error: BaseException | None) -> bool:
  """Whether an error or one of its causes is a full disk."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL_CODES:
      return True
    if any(word in str(error) for word in _WORDS):
      return True
    error = error.__cause__ or error.__context__
  return False


@contextlib.contextmanager
def tell_full_disk(
  path: str, latest: Callable[[], int | None]
) -> Iterator[None]:
  """Replaces the error of a full disk by a `FullDisk` that says what to do.

  Args:
    path: the path that the block writes to.
    latest: returns the step of the latest complete checkpoint, if any.

  Raises:
    FullDisk: the disk is full; other errors propagate.
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
  """The step that the same command starts from, as the end of a sentence."""
  if step is None:
    return 'begins anew, as there is no whole checkpoint yet'
  return f'goes on from the checkpoint of step {step}'
