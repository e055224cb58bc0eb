# SPDX-License-Identifier: Apache-2.0
"""Calls that other threads leave for the engine's thread."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar('T')


class NotYet(Exception):
  """Raised by a call that must be tried again after the next step."""


class EngineCall(Generic[T]):
  """A call whose result, or error, another thread waits for."""

  def __init__(self, do: Callable[[], T]):
    self._do = do
    self.future: Future[T] = Future()

  def run(self) -> bool:
    """Calls it; False if it must be tried again."""
    try:
      self.future.set_result(self._do())
    except NotYet:
      return False
    except Exception as e:
      self.future.set_exception(e)
    return True
