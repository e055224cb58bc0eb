# SPDX-License-Identifier: Apache-2.0
"""The server's application, called without sockets."""

import asyncio
import contextlib
import threading
import time

from moepeft.serve.http import app


class Hung(Exception):
  """A request was not answered in its time."""


class InProcess:
  """A client of an application on an event loop in a thread of its own."""

  def __init__(self, service, key=None):
    self.service, self.engine, self.key = service, service.engine, key
    self._app = app.make_app(service)
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    self.slowest = 0.0

  def send(self, method, path, raw=None, seconds=30):
    """(status, content type, bytes).

    Raises:
      Hung: there is no whole answer after so many seconds.
    """
    began = time.perf_counter()
    work = self._call(method, path, raw or b'', seconds)
    future = asyncio.run_coroutine_threadsafe(work, self._loop)
    try:
      # The loop itself may hang: then its own time-out does nothing.
      return future.result(seconds + 5)
    except TimeoutError:
      raise Hung(f'{method} {path} {(raw or b"")[:2000]!r}') from None
    finally:
      self.slowest = max(self.slowest, time.perf_counter() - began)

  async def _call(self, method, path, raw, seconds):
    headers = [(b'content-type', b'application/json'), (b'host', b'localhost')]
    if self.key:
      headers.append((b'authorization', f'Bearer {self.key}'.encode()))
    scope = {
      'type': 'http',
      'asgi': {'version': '3.0'},
      'http_version': '1.1',
      'method': method,
      'scheme': 'http',
      'path': path,
      'raw_path': path.encode(errors='replace'),
      'root_path': '',
      'query_string': b'',
      'headers': headers,
      'client': ('127.0.0.1', 1),
      'server': ('127.0.0.1', 2),
    }
    body = iter([{'type': 'http.request', 'body': raw, 'more_body': False}])
    answered = asyncio.Event()
    messages = []

    async def receive():
      for message in body:
        return message
      await answered.wait()
      return {'type': 'http.disconnect'}

    async def send(message):
      messages.append(message)

    try:
      async with asyncio.timeout(seconds):
        await self._app(scope, receive, send)
    finally:
      answered.set()
    start, *parts = messages
    content = b''.join(part.get('body', b'') for part in parts)
    kind = dict(start['headers']).get(b'content-type', b'').decode()
    return start['status'], kind, content

  def close(self):
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(5)
    self._loop.close()


@contextlib.contextmanager
def in_process(service, key=None):
  """A client of a service whose engine has started."""
  service.engine.start(lambda *_: None)
  client = InProcess(service, key)
  try:
    yield client
  finally:
    client.close()
    service.engine.stop()
    service.tokenizer.close()
