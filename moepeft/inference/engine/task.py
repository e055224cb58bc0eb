# SPDX-License-Identifier: Apache-2.0
"""What another thread wants done on the engine's."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar('T')


class Later(Exception):
  """Raised by a task that cannot be done yet."""


class Task(Generic[T]):
  """A call whose result, or error, another thread waits for in `done`."""

  def __init__(self, do: Callable[[], T]):
    self._do = do
    self.done: Future[T] = Future()

  def run(self) -> bool:
    """Does it; whether that was the end of it."""
    try:
      self.done.set_result(self._do())
    except Later:
      return False
    except Exception as e:
      self.done.set_exception(e)
    return True
