# SPDX-License-Identifier: Apache-2.0
"""The middleware: request id, API key, host check, metrics, access log."""

import asyncio
import hashlib
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moepeft.serve.http import access
from moepeft.serve.http.body import ClientDisconnected
from moepeft.serve.http.errors import ApiError, server_error, unavailable
from moepeft.serve.http.request_stats import RequestStats
from moepeft.serve.http.service import Service

_LOG = logging.getLogger('moepeft.serve')
# Routes that need no API key.
KEYLESS_PATHS = ('/health', '/')
PROBES = ('/health', '/ready', '/metrics')
# Routes that are answered while the server starts or shuts down.
_ALWAYS_ANSWERED = (*PROBES, '/')
_REQUEST_ID = re.compile(rb'[\w.-]{1,64}')
# The status that nginx logs when the client has closed the connection.
_CLIENT_CLOSED_REQUEST = 499


class RequestMiddleware:
  """ASGI middleware; it adds a `RequestStats` to the scope as 'stats'."""

  def __init__(self, app: ASGIApp, service: Service):
    self._app, self._service = app, service

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._lifespan_or_websocket(scope, receive, send)
      return
    headers = dict(scope['headers'])
    stats = RequestStats(_request_id(headers), self._client(scope, headers))
    scope['stats'] = stats
    sender = _ResponseSender(send, stats.id)
    try:
      self._check(scope, headers)
      await self._app(scope, receive, sender)
    except ClientDisconnected:
      sender.status = _CLIENT_CLOSED_REQUEST
    except ApiError as e:
      await e.response()(scope, receive, sender)
    except asyncio.CancelledError:
      # uvicorn cancels the requests that are left at the end of the shutdown.
      if not self._service.draining or sender.started:
        raise
      error = unavailable('the server is shutting down', 10, 'draining')
      await error.response()(scope, receive, sender)
    except Exception:
      _LOG.exception('request %s failed', stats.id)
      if not sender.started:
        error = server_error("the server failed; see the server's log")
        await error.response()(scope, receive, sender)
    finally:
      self._record(scope, sender.status, stats)

  def _client(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
    """The client's name in the fair queue: its hashed key or its address."""
    authorization = headers.get(b'authorization', b'')
    if self._service.keys.users and authorization:
      return hashlib.sha256(authorization).hexdigest()[:16]
    return _address(scope)

  async def _lifespan_or_websocket(
    self, scope: Scope, receive: Receive, send: Send
  ) -> None:
    """Passes lifespan events on, and refuses websockets."""
    if scope['type'] == 'lifespan':
      await self._app(scope, receive, send)
    elif scope['type'] == 'websocket':
      await send({'type': 'websocket.close', 'code': 1003})

  def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
    """Checks the host, the API key, and whether the server is ready.

    Raises:
      ApiError: a check failed.
    """
    service, path = self._service, scope['path']
    access.check_host(service.hosts, headers)
    if path not in KEYLESS_PATHS:
      access.check_key(service.keys, headers)
    if path in _ALWAYS_ANSWERED:
      return
    if service.draining:
      raise unavailable('the server is shutting down', 10, 'draining')
    if not service.engine.ready:
      raise unavailable('the server is starting', 5, 'starting')

  def _record(self, scope: Scope, status: int, stats: RequestStats) -> None:
    route = getattr(scope.get('route'), 'path', 'other')
    seconds = time.perf_counter() - stats.started
    self._service.metrics.record(route, status, seconds, stats)
    # `repr` escapes control characters, which could change a terminal.
    path = repr(scope['path'])[1:-1]
    # Probes arrive every few seconds and would fill the log.
    level = logging.DEBUG if scope['path'] in PROBES else logging.INFO
    _LOG.log(
      level,
      '%s',
      stats.log_line(scope['method'], path, status, _address(scope)),
    )


class _ResponseSender:
  """An ASGI `send` that adds the header x-request-id and records the status."""

  def __init__(self, send: Send, request_id: str):
    self._send, self._request_id = send, request_id
    self.status, self.started = 500, False

  async def __call__(self, message: Message) -> None:
    if message['type'] == 'http.response.start':
      self.status, self.started = message['status'], True
      header = (b'x-request-id', self._request_id.encode())
      message['headers'] = [*message.get('headers', ()), header]
    await self._send(message)


def _request_id(headers: dict[bytes, bytes]) -> str:
  """The request id of the client's header if it is valid, or a new one."""
  header = headers.get(b'x-request-id', b'')
  if _REQUEST_ID.fullmatch(header):
    return header.decode()
  return f'req_{secrets.token_hex(8)}'


def _address(scope: Scope) -> str:
  return (scope.get('client') or ('-',))[0]
