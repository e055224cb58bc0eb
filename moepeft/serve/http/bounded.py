# SPDX-License-Identifier: Apache-2.0
"""A thread with a queue of limited length."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from moepeft.inference.api import EngineFull

Result = TypeVar('Result')


class BoundedThread:
  """Runs calls one after the other; any thread may submit them."""

  def __init__(self, name: str):
    self._executor = ThreadPoolExecutor(1, name)
    self._lock, self._count = threading.Lock(), 0

  def submit(
    self, queue: int, call: Callable[..., Result], *args: Any
  ) -> Future[Result]:
    """Submits a call.

    Args:
      queue: the maximum number of waiting calls.

    Raises:
      EngineFull: as many calls wait already.
    """
    with self._lock:
      if self._count > queue:
        raise EngineFull(
          f'{queue:,} requests wait already; try again later', 2.0
        )
      self._count += 1
    future = self._executor.submit(call, *args)
    # Cancelled calls are done too; a running call counts until it returns.
    future.add_done_callback(self._done)
    return future

  def _done(self, future: Future) -> None:
    del future
    with self._lock:
      self._count -= 1
