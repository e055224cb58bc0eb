# SPDX-License-Identifier: Apache-2.0
"""Connections with limits on time, size and number.

uvicorn closes only connections that are idle between two requests: one that
sends nothing, half a head or half a body stays until its client leaves, and
each holds a file descriptor.
"""

import asyncio
import dataclasses
import math
import resource
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from moepeft.serve.http.errors import ApiError, unavailable

# Seconds in which a client may read the reason why it is refused; so many
# connections may be in these seconds.
_LINGER, _LINGERING = 1.0, 64
# Descriptors beside those of connections: the model's files, logs, threads.
_OTHER_FILES = 256
_LARGEST = 1e6


@dataclasses.dataclass(frozen=True)
class ConnectionLimits:
  """
  Attributes:
    count: connections at once. Beyond it the one that has waited longest for
      a request is closed, and where all have one, a new one gets 503.
    head: seconds from a request's first byte to the end of its headers; of a
      new connection, from its beginning.
    body: seconds from the end of the headers to that of the body.
    idle: seconds between two requests.
    send: seconds in which a client reads something of what waits for it.
    head_bytes: of a request's line and headers.
  """

  count: int = 512
  head: float = 20.0
  body: float = 60.0
  # More than proxies keep theirs.
  idle: float = 75.0
  send: float = 60.0
  head_bytes: int = 1 << 15

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      # Not `value <= 0`: NaN is neither above nor below.
      if not 0 < value <= _LARGEST:
        raise ValueError(
          f'the limit {field.name} of connections is above 0 and at most '
          f'{_LARGEST:,.0f}; got {value}'
        )


DEFAULT = ConnectionLimits()


def open_files(limits: ConnectionLimits) -> ConnectionLimits:
  """Limits whose connections leave file descriptors for other files.

  The process's own limit of open files is raised where that is allowed; where
  it is not, `count` is lowered.

  Raises:
    ValueError: too few are allowed for any connection.
  """
  needed = limits.count + _LINGERING + _OTHER_FILES
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  soft = math.inf if soft == resource.RLIM_INFINITY else soft
  hard = math.inf if hard == resource.RLIM_INFINITY else hard
  if soft < needed:
    soft = min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, _as_limit(hard)))
  count = min(limits.count, soft - _LINGERING - _OTHER_FILES)
  if count < 1:
    raise ValueError(
      f'the process may open {soft} files, and the server needs {needed:,} for '
      f'--max_connections={limits.count}; raise the limit (ulimit -n)'
    )
  return dataclasses.replace(limits, count=int(count))


def _as_limit(value: float) -> int:
  return resource.RLIM_INFINITY if value == math.inf else int(value)


class Connection(H11Protocol):
  """uvicorn's HTTP/1.1 with the limits of a subclass's `limits`."""

  limits = DEFAULT

  # The timer of what the client has to send, and what that is.
  _timer: asyncio.TimerHandle | None = None
  _awaited = ''
  _sending: asyncio.TimerHandle | None = None
  _refused = False
  # When the connection began to wait for it.
  _since = 0.0

  @property
  def waits(self) -> bool:
    """Whether no request is being answered, and none has its headers."""
    return not self._refused and self._awaited in ('head', 'idle')

  def connection_made(self, transport: asyncio.Transport) -> None:
    open_connections = list(self.connections)
    super().connection_made(transport)
    if len(open_connections) >= self.limits.count and not self._make_room(
      open_connections
    ):
      self._refused = True
      if len(open_connections) >= self.limits.count + _LINGERING:
        transport.abort()
        return
      self._refuse(
        unavailable(
          'the server has all the connections that it takes', 5, 'busy'
        )
      )
      return
    self._await('head')

  def _make_room(self, open_connections: list['Connection']) -> bool:
    """Closes the connection that has waited longest; whether there is one."""
    waiting = [
      connection for connection in open_connections if connection.waits
    ]
    if not waiting:
      return False
    longest = min(waiting, key=lambda connection: connection._since)
    # Its end comes in a later turn of the loop, other connections in this one.
    self.connections.discard(longest)
    longest.transport.abort()
    return True

  def connection_lost(self, exc: Exception | None) -> None:
    self._await('')
    self._stop_sending()
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    if self._refused:
      return
    if self._awaited == 'idle':
      self._await('head')
    super().data_received(data)

  def handle_events(self) -> None:
    super().handle_events()
    if self._refused or self.transport.is_closing():
      return
    state = self.conn.their_state
    if state is h11.SEND_BODY:
      if self._awaited != 'body':
        self._await('body')
    elif state is not h11.IDLE:
      self._await('')
    elif self._awaited == 'body':
      # The answer was out before the body was whole.
      self._await_request()

  def on_response_complete(self) -> None:
    super().on_response_complete()
    if self.transport.is_closing():
      self._abort_later(self.limits.send)
    elif self.conn.their_state is h11.IDLE and self._awaited == '':
      self._await_request()

  def pause_writing(self) -> None:
    super().pause_writing()
    self._watch_sending(self.transport.get_write_buffer_size())

  def resume_writing(self) -> None:
    self._stop_sending()
    super().resume_writing()

  def send_400_response(self, msg: str) -> None:
    """Answers what is no HTTP."""
    if len(self.conn.trailing_data[0]) > self.limits.head_bytes:
      message = f'the headers are longer than {self.limits.head_bytes:,} bytes'
      self._refuse(ApiError(431, message, None, 'headers_too_long'))
    else:
      self._refuse(
        ApiError(400, 'the request is no HTTP/1.1', None, 'not_http')
      )

  def _await_request(self) -> None:
    """Starts the timer of the next request, some of which may be there."""
    self._await('head' if self.conn.trailing_data[0] else 'idle')

  def _await(self, message: str) -> None:
    """Starts the timer of what the client has to send.

    Args:
      what: 'head', 'body' or 'idle', as limits are called; '' for nothing.
    """
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None
    self._awaited, self._since = message, time.monotonic()
    if message:
      seconds = getattr(self.limits, message)
      self._timer = self.loop.call_later(seconds, self._late)

  def _late(self) -> None:
    """The client has not sent in time what was awaited."""
    if self._awaited != 'body' and not self.conn.trailing_data[0]:
      # Browsers open connections that they may never use.
      self.transport.close()
      self._abort_later(self.limits.send)
      return
    name = 'headers' if self._awaited == 'head' else 'body'
    seconds = getattr(self.limits, self._awaited)
    message = f'the {name} of the request did not come within {seconds:g} s'
    self._refuse(ApiError(408, message, None, 'request_timeout'))

  def _refuse(self, problem: ApiError) -> None:
    """Answers without the application, where nothing is answered yet, and
    closes."""
    self._await('')
    self._refused = True
    if self.cycle is not None and not self.cycle.response_complete:
      # The application need not wait for the rest.
      self.cycle.disconnected = True
      self.cycle.message_event.set()
    if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
      response = problem.response()
      headers = [*response.raw_headers, (b'connection', b'close')]
      for event in (
        h11.Response(status_code=problem.status, headers=headers),
        h11.Data(data=response.body),
        h11.EndOfMessage(),
      ):
        self.transport.write(self.conn.send(event))
      # Closing while bytes come would take the answer from the client.
      self.transport.write_eof()
    else:
      self.transport.close()
    self._abort_later(_LINGER)

  def eof_received(self) -> None:
    if self._refused:
      self.transport.close()

  def _abort_later(self, seconds: float) -> None:
    # Closing waits until the client has read what was written.
    self.loop.call_later(seconds, self.transport.abort)

  def _watch_sending(self, size: int) -> None:
    """Ends the connection of a client that reads nothing of what waits."""
    self._stop_sending()

    def check() -> None:
      left = self.transport.get_write_buffer_size()
      if left >= size:
        self.transport.abort()
      else:
        self._watch_sending(left)

    self._sending = self.loop.call_later(self.limits.send, check)

  def _stop_sending(self) -> None:
    if self._sending is not None:
      self._sending.cancel()
      self._sending = None


def limited(limits: ConnectionLimits) -> type[Connection]:
  """The protocol class for uvicorn, which makes one for each connection."""
  return type('LimitedConnection', (Connection,), {'limits': limits})
