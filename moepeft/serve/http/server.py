# SPDX-License-Identifier: Apache-2.0
"""Runs the server: opens the socket, starts the engine, and shuts down."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from moepeft.serve.http import app
from moepeft.serve.http.connection import (
  DEFAULT_LIMITS,
  ConnectionLimits,
  make_protocol,
)
from moepeft.serve.http.service import Service

_LOG = logging.getLogger('moepeft.serve')
# Threads for blocking calls; twice `constraints.grammar.Limits.processes`.
_THREADS = 96
# Seconds for closing the connections after the engine has stopped.
_CLOSE_SECONDS = 5


def make_config(
  asgi_app: ASGIApp, connections: ConnectionLimits, close_seconds: float
) -> uvicorn.Config:
  """The settings of uvicorn.

  Args:
    close_seconds: seconds for open requests at the end.
  """
  return uvicorn.Config(
    asgi_app,
    http=make_protocol(connections),
    ws='none',
    lifespan='off',
    log_config=None,
    access_log=False,
    server_header=False,
    # The protocol has its own keep-alive timer, which must be the shorter.
    timeout_keep_alive=2 * connections.idle_seconds,
    h11_max_incomplete_event_size=connections.max_head_bytes,
    timeout_graceful_shutdown=close_seconds,
  )


class Server(uvicorn.Server):
  """A uvicorn server that drains before it exits.

  After the first SIGTERM or SIGINT, new requests get 503, and running requests
  may finish within `drain_seconds`; then the engine cancels them. The second
  signal exits at once.

  Attributes:
    interrupted: whether the signal was SIGINT.
    stopped: whether the engine has stopped; it does not stop while it compiles.
    on_timeout: called on a separate thread if the server has not exited ten
      seconds after `drain_seconds`, or five seconds after the second signal.
  """

  def __init__(
    self,
    service: Service,
    drain_seconds: float,
    connections: ConnectionLimits = DEFAULT_LIMITS,
  ):
    """
    Args:
      drain_seconds: seconds in which running requests may finish.
    """
    config = make_config(app.make_app(service), connections, _CLOSE_SECONDS)
    super().__init__(config)
    self._service, self._drain_seconds = service, drain_seconds
    self.interrupted, self.stopped = False, False
    self.on_timeout: Callable[[], None] = lambda: None

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """Handles a signal; uvicorn calls it on the main thread."""
    del frame
    if self._service.draining:
      self.should_exit = self.force_exit = True
      self._start_timeout(_CLOSE_SECONDS)
      return
    self.interrupted = sig == signal.SIGINT
    _LOG.info('%s: draining', signal.Signals(sig).name)
    self.drain()

  def drain(self) -> None:
    """Starts to shut down, on any thread, and returns at once."""
    self._service.draining = True
    self._start_timeout(self._drain_seconds + 2 * _CLOSE_SECONDS)
    # A signal handler must not wait for the engine's lock.
    threading.Thread(target=self._drain, name='drain', daemon=True).start()

  def _start_timeout(self, seconds: float) -> None:
    timer = threading.Timer(seconds, lambda: self.on_timeout())
    timer.daemon = True
    timer.start()

  def _drain(self) -> None:
    try:
      if not self._service.engine.drain(self._drain_seconds):
        _LOG.info('answers are cut off after %g s', self._drain_seconds)
      stop_thread = threading.Thread(
        target=self._service.engine.stop, daemon=True
      )
      stop_thread.start()
      stop_thread.join(_CLOSE_SECONDS)
      self.stopped = not stop_thread.is_alive()
    finally:
      self.should_exit = True


async def _run(server: Server, sock: socket.socket) -> None:
  # Threads wait for the compilation of constraints and the reading of adapters.
  # There are more threads than such waits, so that bodies are always parsed.
  threads = ThreadPoolExecutor(_THREADS, 'request')
  asyncio.get_running_loop().set_default_executor(threads)
  await server.serve([sock])


def serve(
  server: Server,
  sock: socket.socket,
  start: Callable[[], None],
) -> None:
  """Serves until a signal, and calls `start` on a separate thread.

  Args:
    start: starts the engine.

  Raises:
    Exception: the error of `start`, after the server has exited.
  """
  errors: list[BaseException] = []

  def begin() -> None:
    try:
      start()
    except BaseException as e:
      errors.append(e)
      server.should_exit = True

  thread = threading.Thread(target=begin, name='start', daemon=True)
  thread.start()
  asyncio.run(_run(server, sock))
  if errors:
    raise errors[0]
