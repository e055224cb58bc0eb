# SPDX-License-Identifier: Apache-2.0
"""Passes the engine's events of a request to the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from starlette.types import Receive

from moepeft.inference import api
from moepeft.inference.api import Event, Finished, Request
from moepeft.inference.engine.engine import Engine
from moepeft.serve.http.body import ClientDisconnected
from moepeft.serve.http.errors import server_error

Result = TypeVar('Result')
# (index of the engine request, event)
IndexedEvent = tuple[int, Event]
# Seconds after a request's timeout in which the engine must finish it.
_GRACE_SECONDS = 30.0


class ClientRequests:
  """The engine requests of one HTTP request."""

  def __init__(self, engine: Engine, requests: Sequence[Request]):
    """Submits all requests to the engine, or none.

    Raises:
      api.RequestRefused: the engine does not accept one of them.
    """
    self._engine, self._loop = engine, asyncio.get_running_loop()
    self._events: asyncio.Queue[IndexedEvent] = asyncio.Queue()
    self._unfinished: dict[int, Request] = {}
    self._requests = tuple(requests)
    try:
      for index, request in enumerate(requests):
        engine.submit(request, self._deliverer(index))
        self._unfinished[index] = request
    except api.RequestRefused:
      self.close()
      raise

  def _deliverer(self, index: int) -> Callable[[Event], None]:
    def deliver(event: Event) -> None:
      # The loop may be closed, if the server has shut down in between.
      with contextlib.suppress(RuntimeError):
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    return deliver

  async def batches(self) -> AsyncIterator[list[IndexedEvent]]:
    """Yields new events, in batches, until all requests are finished.

    Raises:
      ApiError: the engine has not finished a request long after its timeout.
    """
    while self._unfinished:
      batch = [await self._next()]
      while not self._events.empty():
        batch.append(self._events.get_nowait())
      for index, event in batch:
        if isinstance(event, Finished):
          self._unfinished.pop(index, None)
      yield batch

  async def _next(self) -> IndexedEvent:
    timeouts = [request.timeout for request in self._unfinished.values()]
    timeout = None if None in timeouts else max(timeouts) + _GRACE_SECONDS
    try:
      return await asyncio.wait_for(self._events.get(), timeout)
    except TimeoutError:
      raise server_error(
        "the engine does not answer; see the server's log"
      ) from None

  def constraint_error(self, index: int) -> str:
    """The error message of a request's constraint; '' without an error."""
    return getattr(self._requests[index].constraint, 'reason', '')

  def cancel(self, index: int) -> None:
    """Cancels one request; its Finished event follows."""
    if index in self._unfinished:
      self._engine.cancel(self._unfinished[index].id)

  def close(self) -> None:
    """Cancels all unfinished requests."""
    for index in list(self._unfinished):
      self._engine.cancel(self._unfinished.pop(index).id)


async def wait_for_disconnect(receive: Receive) -> None:
  """Returns when the client has disconnected."""
  while (await receive())['type'] != 'http.disconnect':
    pass


async def cancel_on_disconnect(
  receive: Receive, awaitable: Awaitable[Result]
) -> Result:
  """Awaits `awaitable`, and cancels it when the client disconnects.

  Starlette does not cancel handlers of disconnected clients.

  Raises:
    ClientDisconnected: the client has disconnected.
  """
  tasks = (
    asyncio.ensure_future(awaitable),
    asyncio.ensure_future(wait_for_disconnect(receive)),
  )
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if tasks[0].done():
      return tasks[0].result()
    raise ClientDisconnected
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
