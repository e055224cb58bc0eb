# SPDX-License-Identifier: Apache-2.0
"""Lets scripts of named pages ask (CORS); off unless origins are named."""

from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ALLOWED = (
  (b'access-control-allow-methods', b'GET, POST, DELETE'),
  (b'access-control-max-age', b'600'),
)
_EXPOSED = (b'access-control-expose-headers', b'x-request-id, retry-after')


class Cors:
  """ASGI middleware, before the keys: a browser asks first without one."""

  def __init__(self, app: ASGIApp, origins: Sequence[str]):
    """
    Args:
      origins: as 'https://chat.example'; ('*',) for every page.
    """
    self._app = app
    self._origins = frozenset(origin.encode() for origin in origins)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http' or not self._origins:
      await self._app(scope, receive, send)
      return
    headers = dict(scope['headers'])
    origin = headers.get(b'origin')
    if origin is None or not self._origins & {origin, b'*'}:
      await self._app(scope, receive, send)
      return
    own = [(b'access-control-allow-origin', origin), (b'vary', b'Origin')]
    if scope['method'] == 'OPTIONS':
      asked = headers.get(b'access-control-request-headers', b'')
      own += [*_ALLOWED, (b'access-control-allow-headers', asked)]
      start = {'type': 'http.response.start', 'status': 204, 'headers': own}
      await send(start)
      await send({'type': 'http.response.body', 'body': b''})
      return

    async def with_origin(message: Message) -> None:
      if message['type'] == 'http.response.start':
        message['headers'] = [*message.get('headers', ()), *own, _EXPOSED]
      await send(message)

    await self._app(scope, receive, with_origin)
