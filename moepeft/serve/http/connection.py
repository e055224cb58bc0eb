# SPDX-License-Identifier: Apache-2.0
"""A protocol for uvicorn that limits the time, size and number of connections.

uvicorn closes a connection only while it is idle between two requests. A client
that sends nothing, or only a part of a request, would keep its connection, and
with it a file descriptor, for as long as it likes.
"""

import asyncio
import dataclasses
import math
import resource
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from moepeft.serve.http.errors import ApiError, unavailable

# Seconds that a refused client has to read the error.
_CLOSE_SECONDS = 1.0
# The most refused connections that are open at a time; more are aborted.
_MAX_REFUSED = 64
# File descriptors for anything but connections: model files, logs, threads.
_RESERVED_FILES = 256
_MAX_LIMIT = 1e6


@dataclasses.dataclass(frozen=True)
class ConnectionLimits:
  """The limits of a server's connections.

  Attributes:
    max_connections: the most open connections. For a new connection beyond
      them, the one that has waited longest for a request is closed; if none is
      waiting, the new connection gets 503.
    head_seconds: the most seconds from a request's first byte to the end of its
      headers. On a new connection, the time starts when it is opened.
    body_seconds: the most seconds from the end of the headers to the end of the
      body.
    idle_seconds: the most seconds between two requests.
    send_seconds: the most seconds in which a client reads no byte of a response
      that the server is sending.
    max_head_bytes: the most bytes of a request line and its headers.
  """

  max_connections: int = 512
  head_seconds: float = 20.0
  body_seconds: float = 60.0
  # Longer than the idle timeout of common proxies, so that the proxy closes.
  idle_seconds: float = 75.0
  send_seconds: float = 60.0
  max_head_bytes: int = 1 << 15

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      # Not `value <= 0`: NaN is neither above nor below.
      if not 0 < value <= _MAX_LIMIT:
        raise ValueError(
          f'expected {field.name} above 0 and at most {_MAX_LIMIT:,.0f}; got '
          f'{value}'
        )


DEFAULT_LIMITS = ConnectionLimits()


def reserve_file_descriptors(limits: ConnectionLimits) -> ConnectionLimits:
  """Raises the process's limit of open files to what the connections need.

  Returns:
    The limits, with a lower `max_connections` if the process may not open
    enough files.

  Raises:
    ValueError: the process may not open a file for even one connection.
  """
  needed = limits.max_connections + _MAX_REFUSED + _RESERVED_FILES
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  soft = math.inf if soft == resource.RLIM_INFINITY else soft
  hard = math.inf if hard == resource.RLIM_INFINITY else hard
  if soft < needed:
    soft = min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, _as_limit(hard)))
  max_connections = min(
    limits.max_connections, soft - _MAX_REFUSED - _RESERVED_FILES
  )
  if max_connections < 1:
    raise ValueError(
      f'the process may open {soft} files, and the server needs {needed:,} for '
      f'--max_connections={limits.max_connections}; raise the limit (ulimit -n)'
    )
  return dataclasses.replace(limits, max_connections=int(max_connections))


def _as_limit(value: float) -> int:
  return resource.RLIM_INFINITY if value == math.inf else int(value)


class Connection(H11Protocol):
  """uvicorn's HTTP/1.1 protocol with limits; see `make_protocol`.

  A connection has a phase, which is the part of a request that the client has
  to send next: 'head', 'body', 'idle' (no request has begun) or '' (none).
  """

  limits = DEFAULT_LIMITS

  _phase = ''
  _phase_start = 0.0
  _receive_timer: asyncio.TimerHandle | None = None
  _send_timer: asyncio.TimerHandle | None = None
  _is_refused = False

  @property
  def is_waiting(self) -> bool:
    """Whether the server waits for the headers of a request."""
    return not self._is_refused and self._phase in ('head', 'idle')

  def connection_made(self, transport: asyncio.Transport) -> None:
    open_connections = list(self.connections)
    super().connection_made(transport)
    is_full = len(open_connections) >= self.limits.max_connections
    if is_full and not self._close_longest_waiting(open_connections):
      self._is_refused = True
      if len(open_connections) >= self.limits.max_connections + _MAX_REFUSED:
        transport.abort()
        return
      message = 'the server has reached its limit of connections'
      self._refuse(unavailable(message, 5, 'busy'))
      return
    self._start_phase('head')

  def _close_longest_waiting(
    self, open_connections: list['Connection']
  ) -> bool:
    """Closes the connection that has waited longest for a request.

    Returns:
      Whether there was such a connection.
    """
    waiting = [
      connection for connection in open_connections if connection.is_waiting
    ]
    if not waiting:
      return False
    longest = min(waiting, key=lambda connection: connection._phase_start)
    # `connection_lost` runs in a later iteration of the event loop; other
    # connections may be made before.
    self.connections.discard(longest)
    longest.transport.abort()
    return True

  def connection_lost(self, exc: Exception | None) -> None:
    self._start_phase('')
    self._cancel_send_timer()
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    if self._is_refused:
      return
    if self._phase == 'idle':
      self._start_phase('head')
    super().data_received(data)

  def handle_events(self) -> None:
    super().handle_events()
    if self._is_refused or self.transport.is_closing():
      return
    state = self.conn.their_state
    if state is h11.SEND_BODY:
      if self._phase != 'body':
        self._start_phase('body')
    elif state is not h11.IDLE:
      self._start_phase('')
    elif self._phase == 'body':
      # The response was sent before the body was complete.
      self._start_next_request()

  def on_response_complete(self) -> None:
    super().on_response_complete()
    if self.transport.is_closing():
      self._abort_later(self.limits.send_seconds)
    elif self.conn.their_state is h11.IDLE and self._phase == '':
      self._start_next_request()

  def pause_writing(self) -> None:
    super().pause_writing()
    self._start_send_timer(self.transport.get_write_buffer_size())

  def resume_writing(self) -> None:
    self._cancel_send_timer()
    super().resume_writing()

  def send_400_response(self, msg: str) -> None:
    """Refuses a request that h11 cannot parse."""
    if len(self.conn.trailing_data[0]) > self.limits.max_head_bytes:
      message = (
        f'the headers are longer than {self.limits.max_head_bytes:,} bytes'
      )
      self._refuse(ApiError(431, message, None, 'headers_too_long'))
    else:
      self._refuse(
        ApiError(400, 'the request is not valid HTTP/1.1', None, 'not_http')
      )

  def _start_next_request(self) -> None:
    """Starts the phase of the next request, which may have arrived in part."""
    self._start_phase('head' if self.conn.trailing_data[0] else 'idle')

  def _start_phase(self, phase: str) -> None:
    """Starts a phase and its timer: 'head', 'body', 'idle' or ''."""
    if self._receive_timer is not None:
      self._receive_timer.cancel()
      self._receive_timer = None
    self._phase, self._phase_start = phase, time.monotonic()
    if phase:
      seconds = getattr(self.limits, f'{phase}_seconds')
      self._receive_timer = self.loop.call_later(
        seconds, self._on_receive_timeout
      )

  def _on_receive_timeout(self) -> None:
    """Closes the connection, with 408 if a part of a request has arrived."""
    if self._phase != 'body' and not self.conn.trailing_data[0]:
      # Browsers open connections that they may never use.
      self.transport.close()
      self._abort_later(self.limits.send_seconds)
      return
    name = 'headers' if self._phase == 'head' else 'body'
    seconds = getattr(self.limits, f'{self._phase}_seconds')
    message = f'the {name} of the request did not arrive within {seconds:g} s'
    self._refuse(ApiError(408, message, None, 'request_timeout'))

  def _refuse(self, error: ApiError) -> None:
    """Closes the connection, with an error if no response has been started."""
    self._start_phase('')
    self._is_refused = True
    if self.cycle is not None and not self.cycle.response_complete:
      # Wakes the application if it waits for the rest of the body.
      self.cycle.disconnected = True
      self.cycle.message_event.set()
    if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
      response = error.response()
      headers = [*response.raw_headers, (b'connection', b'close')]
      for event in (
        h11.Response(status_code=error.status, headers=headers),
        h11.Data(data=response.body),
        h11.EndOfMessage(),
      ):
        self.transport.write(self.conn.send(event))
      # Not `close`: if bytes arrive after it, the client gets a reset instead
      # of the response.
      self.transport.write_eof()
    else:
      self.transport.close()
    self._abort_later(_CLOSE_SECONDS)

  def eof_received(self) -> None:
    if self._is_refused:
      self.transport.close()

  def _abort_later(self, seconds: float) -> None:
    # `close` alone would wait until the client has read the response.
    self.loop.call_later(seconds, self.transport.abort)

  def _start_send_timer(self, size: int) -> None:
    """Starts a timer that aborts unless the write buffer gets smaller.

    Args:
      size: bytes in the write buffer.
    """
    self._cancel_send_timer()

    def check() -> None:
      new_size = self.transport.get_write_buffer_size()
      if new_size >= size:
        self.transport.abort()
      else:
        self._start_send_timer(new_size)

    self._send_timer = self.loop.call_later(self.limits.send_seconds, check)

  def _cancel_send_timer(self) -> None:
    if self._send_timer is not None:
      self._send_timer.cancel()
      self._send_timer = None


def make_protocol(limits: ConnectionLimits) -> type[Connection]:
  """A `Connection` class with limits, for the option `http` of uvicorn."""
  return type('LimitedConnection', (Connection,), {'limits': limits})
