# SPDX-License-Identifier: Apache-2.0
"""Middleware of every request: id, API key, host, metrics and access log."""

import asyncio
import hashlib
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moepeft.serve.http.body import ClientDisconnected
from moepeft.serve.http.errors import ApiError, server_error, unavailable
from moepeft.serve.http.request_stats import RequestStats
from moepeft.serve.http.service import Service

_LOG = logging.getLogger('moepeft.serve')
# Routes without a key: whether the process lives, and the page's own file.
FREE = ('/health', '/')
PROBES = ('/health', '/ready', '/metrics')
# What is answered while the server starts or goes down.
_ALWAYS = (*PROBES, '/')
_ID = re.compile(rb'[\w.-]{1,64}')
# As proxies write it: the client closed the request.
_LEFT = 499


class RequestMiddleware:
  """ASGI middleware; the scope gets a `RequestStats` as 'stats'."""

  def __init__(self, app: ASGIApp, service: Service):
    self._app, self._service = app, service

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._lifespan_or_websocket(scope, receive, send)
      return
    headers = dict(scope['headers'])
    stats = RequestStats(_id(headers), self._client(scope, headers))
    scope['stats'] = stats
    sent = _Sent(send, stats.id)
    try:
      self._check(scope, headers)
      await self._app(scope, receive, sent)
    except ClientDisconnected:
      sent.status = _LEFT
    except ApiError as e:
      await e.response()(scope, receive, sent)
    except asyncio.CancelledError:
      # The server cancels, as its last act, what the engine did not end.
      if not self._service.draining or sent.begun:
        raise
      problem = unavailable('the server is going down', 10, 'draining')
      await problem.response()(scope, receive, sent)
    except Exception:
      _LOG.exception('request %s failed', stats.id)
      if not sent.begun:
        problem = server_error('the server failed; its log says how')
        await problem.response()(scope, receive, sent)
    finally:
      self._note(scope, sent.status, stats)

  def _client(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
    """The client whose requests share one fair queue; contains no key."""
    authorization = headers.get(b'authorization', b'')
    if self._service.keys.users and authorization:
      return hashlib.sha256(authorization).hexdigest()[:16]
    return _address(scope)

  async def _lifespan_or_websocket(
    self, scope: Scope, receive: Receive, send: Send
  ) -> None:
    """Passes lifespan events on, and closes websockets."""
    if scope['type'] == 'lifespan':
      await self._app(scope, receive, send)
    elif scope['type'] == 'websocket':
      await send({'type': 'websocket.close', 'code': 1003})

  def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
    """
    Raises:
      ApiError: the request is not answered.
    """
    service, path = self._service, scope['path']
    host = headers.get(b'host', b'').decode('latin-1')
    if service.hosts and _bare(host) not in service.hosts:
      # A page of elsewhere whose name was made to lead here.
      raise ApiError(
        403,
        f'the server is asked as {host!r}, and answers to '
        f'{", ".join(service.hosts)} alone; use one of these, or start it with '
        'a key',
        None,
        'wrong_host',
      )
    allowed = service.keys.may_ask(headers.get(b'authorization'))
    if path not in FREE and not allowed:
      raise ApiError(
        401,
        'the API key is missing or wrong; send the header '
        "'Authorization: Bearer KEY'",
        None,
        'invalid_api_key',
        headers={'WWW-Authenticate': 'Bearer'},
      )
    if path in _ALWAYS:
      return
    if service.draining:
      raise unavailable('the server is going down', 10, 'draining')
    if not service.engine.ready:
      raise unavailable('the server is starting', 5, 'starting')

  def _note(self, scope: Scope, status: int, stats: RequestStats) -> None:
    route = getattr(scope.get('route'), 'path', 'other')
    took = time.perf_counter() - stats.began
    self._service.metrics.note(route, status, took, stats)
    # Quoted: a path may hold what moves a terminal's cursor.
    path = repr(scope['path'])[1:-1]
    # Probes come every few seconds, and say nothing while all is well.
    level = logging.DEBUG if scope['path'] in PROBES else logging.INFO
    _LOG.log(
      level, '%s', stats.line(scope['method'], path, status, _address(scope))
    )


class _Sent:
  """A `send` that adds the id, and remembers the status."""

  def __init__(self, send: Send, name: str):
    self._send, self._name = send, name
    self.status, self.begun = 500, False

  async def __call__(self, message: Message) -> None:
    if message['type'] == 'http.response.start':
      self.status, self.begun = message['status'], True
      name = (b'x-request-id', self._name.encode())
      message['headers'] = [*message.get('headers', ()), name]
    await self._send(message)


def _id(headers: dict[bytes, bytes]) -> str:
  """The caller's own where it is sane, else a new one."""
  header = headers.get(b'x-request-id', b'')
  if _ID.fullmatch(header):
    return header.decode()
  return f'req_{secrets.token_hex(8)}'


def _address(scope: Scope) -> str:
  return (scope.get('client') or ('-',))[0]


def _bare(host: str) -> str:
  """A Host without its port: '[::1]:8000' -> '[::1]'."""
  return re.sub(r':\d*$', '', host).lower()
