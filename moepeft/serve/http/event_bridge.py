# SPDX-License-Identifier: Apache-2.0
"""Brings the engine's events of a client's requests to the event loop."""

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
# (which of the requests, what came of it)
IndexedEvent = tuple[int, Event]
# Seconds beyond a request's own that an engine has to end it.
_GRACE = 30.0


class ClientRequests:
  """Requests of one client, which end together at the latest by `close`."""

  def __init__(self, engine: Engine, requests: Sequence[Request]):
    """Hands all of them to the engine, or none.

    Raises:
      api.RequestRefused: the engine does not take one of them.
    """
    self._engine, self._loop = engine, asyncio.get_running_loop()
    self._events: asyncio.Queue[IndexedEvent] = asyncio.Queue()
    self._open: dict[int, Request] = {}
    self._requests = tuple(requests)
    try:
      for index, request in enumerate(requests):
        engine.submit(request, self._deliverer(index))
        self._open[index] = request
    except api.RequestRefused:
      self.close()
      raise

  def _deliverer(self, index: int) -> Callable[[Event], None]:
    def deliver(event: Event) -> None:
      # The loop is gone where the server went down in between.
      with contextlib.suppress(RuntimeError):
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    return deliver

  async def batches(self) -> AsyncIterator[list[IndexedEvent]]:
    """New events, in batches, until all requests are finished.

    Raises:
      ApiError: the engine has not answered long after their time was over.
    """
    while self._open:
      batch = [await self._next()]
      while not self._events.empty():
        batch.append(self._events.get_nowait())
      for index, event in batch:
        if isinstance(event, Finished):
          self._open.pop(index, None)
      yield batch

  async def _next(self) -> IndexedEvent:
    times = [request.timeout for request in self._open.values()]
    most = None if None in times else max(times) + _GRACE
    try:
      return await asyncio.wait_for(self._events.get(), most)
    except TimeoutError:
      raise server_error(
        'the engine does not answer; look into its log'
      ) from None

  def trouble(self, index: int) -> str:
    """The reason why a request's constraint failed, or ''."""
    return getattr(self._requests[index].constraint, 'reason', '')

  def end(self, index: int) -> None:
    """No more tokens of one of them; its Finished comes."""
    if index in self._open:
      self._engine.cancel(self._open[index].id)

  def close(self) -> None:
    """Frees what is still under way."""
    for index in list(self._open):
      self._engine.cancel(self._open.pop(index).id)


async def wait_for_disconnect(receive: Receive) -> None:
  """Returns when the client has left."""
  while (await receive())['type'] != 'http.disconnect':
    pass


async def cancel_on_disconnect(
  receive: Receive, work: Awaitable[Result]
) -> Result:
  """Runs `work`, and cancels it when the client disconnects.

  A handler is not cancelled by itself when nobody waits for it any more.

  Raises:
    Gone: the client has left.
  """
  tasks = (
    asyncio.ensure_future(work),
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
