# SPDX-License-Identifier: Apache-2.0
"""Runs the application: the socket, the engine's start, and the end."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn

from moepeft.serve.http import app
from moepeft.serve.http.connection import (
  DEFAULT_LIMITS,
  ConnectionLimits,
  make_protocol,
)
from moepeft.serve.http.service import Service

_LOG = logging.getLogger('moepeft.serve')
# Of the pool that requests use; twice `constraints.Limits.processes`.
_THREADS = 96
# Seconds that connections have after the engine has ended all answers.
_LAST = 5


def listen(host: str, port: int) -> socket.socket:
  """A socket that waits; before the model is read, which takes long.

  Raises:
    ValueError: the address is taken, or is none of this machine.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
    listener.listen(1024)
  except (OSError, OverflowError) as e:
    listener.close()
    reason = getattr(e, 'strerror', None) or str(e)
    raise ValueError(
      f'cannot listen on --host={host} --port={port} ({reason}); name another'
    ) from None
  return listener


class Server(uvicorn.Server):
  """uvicorn that drains before it ends.

  The first SIGTERM or SIGINT: new requests get 503, those under way a time to
  finish, then the engine ends them. The second ends all at once.

  Attributes:
    interrupted: whether it was SIGINT.
    stopped: whether the engine has ended; it does not while it compiles.
    overdue: called on a thread of its own where the server has not ended ten
      seconds after the time that answers have, or five after a second signal:
      something hangs, and the command ends the process.
  """

  def __init__(
    self,
    service: Service,
    seconds: float,
    connections: ConnectionLimits = DEFAULT_LIMITS,
  ):
    """
    Args:
      seconds: that answers under way have to finish.
    """
    config = uvicorn.Config(
      app.make_app(service),
      http=make_protocol(connections),
      ws='none',
      lifespan='off',
      log_config=None,
      access_log=False,
      server_header=False,
      # The protocol has its own timer.
      timeout_keep_alive=2 * connections.idle_seconds,
      h11_max_incomplete_event_size=connections.max_head_bytes,
      timeout_graceful_shutdown=_LAST,
    )
    super().__init__(config)
    self._service, self._seconds = service, seconds
    self.interrupted, self.stopped = False, False
    self.overdue: Callable[[], None] = lambda: None

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """Handles a signal; uvicorn calls it on the main thread."""
    del frame
    if self._service.draining:
      self.should_exit = self.force_exit = True
      self._end_after(_LAST)
      return
    self.interrupted = sig == signal.SIGINT
    _LOG.info('%s: draining', signal.Signals(sig).name)
    self.drain()

  def drain(self) -> None:
    """Begins the end; may be called from any thread, and returns at once."""
    self._service.draining = True
    self._end_after(self._seconds + 2 * _LAST)
    # The engine's lock is not to be waited for in a signal's handler.
    threading.Thread(target=self._drain, name='drain', daemon=True).start()

  def _end_after(self, seconds: float) -> None:
    timer = threading.Timer(seconds, lambda: self.overdue())
    timer.daemon = True
    timer.start()

  def _drain(self) -> None:
    try:
      if not self._service.engine.drain(self._seconds):
        _LOG.info('answers are cut off after %g s', self._seconds)
      end = threading.Thread(target=self._service.engine.stop, daemon=True)
      end.start()
      end.join(_LAST)
      self.stopped = not end.is_alive()
    finally:
      self.should_exit = True


async def _run(server: Server, sock: socket.socket) -> None:
  # Threads wait for constraints that are compiled and for adapters that are
  # read: more than may do so, so that bodies are always parsed.
  threads = ThreadPoolExecutor(_THREADS, 'request')
  asyncio.get_running_loop().set_default_executor(threads)
  await server.serve([sock])


def serve(
  server: Server,
  sock: socket.socket,
  start: Callable[[], None],
) -> None:
  """Answers while `start` runs on a thread of its own, until it is told to end.

  Args:
    start: starts the engine, and says that it is ready.

  Raises:
    Exception: what `start` raised, after the server has ended.
  """
  failed: list[BaseException] = []

  def begin() -> None:
    try:
      start()
    except BaseException as e:
      failed.append(e)
      server.should_exit = True

  thread = threading.Thread(target=begin, name='start', daemon=True)
  thread.start()
  asyncio.run(_run(server, sock))
  if failed:
    raise failed[0]
