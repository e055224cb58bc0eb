# SPDX-License-Identifier: Apache-2.0
"""Calls that other threads enqueue for the engine thread."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar('T')


class RetryLater(Exception):
  """Raised by a call that must be tried again after the next step."""


class EngineCall(Generic[T]):
  """A call whose result, or error, another thread waits for."""

  def __init__(self, function: Callable[[], T]):
    self._function = function
    self.future: Future[T] = Future()

  def run(self) -> bool:
    """Runs the call; returns False if it must be tried again."""
    try:
      self.future.set_result(self._function())
    except RetryLater:
      return False
    except Exception as e:
      self.future.set_exception(e)
    return True
