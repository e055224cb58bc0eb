# SPDX-License-Identifier: Apache-2.0
"""The server's side of the grammar processes."""

import collections
import dataclasses
import itertools
import json
import socket
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Connection

from moepeft.inference.api import EngineFull
from moepeft.inference.constraints import grammar_worker

# The wall time limit per CPU time limit, since processes share the CPU.
_WALL_FACTOR = 4.0
# Seconds for the template process to start and read the vocabulary.
_START_SECONDS = 60


class Matcher:
  """The state of one answer in a grammar, which the grammar's process holds.

  Attributes:
    error: the error message; '' without an error.
    accepting: whether the text may end.
    stopped: whether the text must end.
  """

  def __init__(self, process: 'GrammarProcess', number: int):
    self._process, self._number = process, number
    self.error, self.accepting, self.stopped = '', False, False
    self._ask(grammar_worker.COPY)

  def bitmask(self) -> bytes:
    """The bit mask of the allowed next tokens; b'' after an error."""
    return self._ask(grammar_worker.MASK)[1]

  def forced(self) -> bytes:
    """The bytes with which the text must continue."""
    return self._ask(grammar_worker.FORCED)[1]

  def consume(self, token: int) -> bool:
    """Advances by a token; returns False if it is not allowed."""
    return bool(
      self._ask(grammar_worker.ACCEPT, token)[0] & grammar_worker.CONSUMED
    )

  def _ask(self, operation: int, argument: int = 0) -> tuple[int, bytes]:
    if self.error:
      return grammar_worker.ERROR, b''
    try:
      flags, body = self._process.ask(operation, self._number, argument)
    except GrammarLimit as error:
      self.error = str(error)
      return grammar_worker.ERROR, b''
    self.accepting = bool(flags & grammar_worker.ACCEPTING)
    self.stopped = bool(flags & grammar_worker.STOPPED)
    if flags & grammar_worker.ERROR:
      self.error, self.stopped = body.decode(errors='replace'), True
      return flags, b''
    return flags, body

  def __del__(self):
    # Sent with the next request, because a finalizer may run on any thread.
    self._process.dropped.append(self._number)


class GrammarLimit(ValueError):
  """A grammar's process has exceeded its limits."""


class GrammarProcess:
  """The process of a grammar, which exits when this object is deleted.

  Attributes:
    dropped: the numbers of matchers that were deleted.
  """

  def __init__(
    self, connection: Connection, limits: grammar_worker.ProcessLimits
  ):
    self._connection, self._limits = connection, limits
    # The engine and several requests may use the process. The limits bound the
    # time for which the lock is held.
    self._lock = threading.Lock()
    self._numbers = itertools.count(1)
    self._failure = ''
    self.dropped: collections.deque[int] = collections.deque()

  def compile(self, grammar: str) -> str:
    """Compiles the grammar, and returns the error message or ''.

    Raises:
      GrammarLimit: it takes too much time or memory.
    """
    flags, body = self.ask(grammar_worker.COMPILE, 0, 0, grammar)
    return body.decode(errors='replace') if flags & grammar_worker.ERROR else ''

  def matcher(self) -> Matcher:
    """Returns a matcher in the initial state."""
    return Matcher(self, next(self._numbers))

  def ask(
    self, operation: int, number: int, argument: int = 0, text: str = ''
  ) -> tuple[int, bytes]:
    """Sends a request, and returns the flags and bytes of the reply.

    Raises:
      GrammarLimit: the process has exceeded its limits, now or before.
    """
    limits = self._limits
    compiling = operation == grammar_worker.COMPILE
    seconds = limits.compile_seconds if compiling else limits.step_seconds
    with self._lock:
      if self._failure:
        raise GrammarLimit(self._failure)
      try:
        while self.dropped:
          self._send(grammar_worker.DROP, self.dropped.popleft())
        self._send(operation, number, argument, text)
        if not self._connection.poll(_WALL_FACTOR * seconds + 1):
          raise EOFError
        reply = self._connection.recv_bytes()
      except (EOFError, OSError):
        self._connection.close()
        self._failure = (
          f'it takes more than {seconds:g} s of processor time or '
          f'{limits.memory >> 20:,} MB of memory'
        )
        raise GrammarLimit(self._failure) from None
    return reply[0], reply[1:]

  def _send(
    self, operation: int, number: int, argument: int = 0, text: str = ''
  ) -> None:
    header = grammar_worker.REQUEST.pack(operation, number, argument)
    self._connection.send_bytes(header + text.encode())


class GrammarPool:
  """Starts grammar processes for a vocabulary, up to a maximum number."""

  def __init__(
    self,
    vocabulary: bytes,
    processes: int,
    limits: grammar_worker.ProcessLimits,
  ):
    """
    Args:
      vocabulary: the message of `grammar_worker.pack_vocabulary`.
      processes: the maximum number of processes.
    """
    self._vocabulary, self._max_processes, self._limits = (
      vocabulary,
      processes,
      limits,
    )
    self._lock = threading.Lock()
    self._alive: weakref.WeakSet[GrammarProcess] = weakref.WeakSet()
    self._template: socket.socket | None = None

  def full(self) -> bool:
    return len(self._alive) >= self._max_processes

  def start_process(self) -> GrammarProcess:
    """Starts a process.

    Raises:
      EngineFull: the maximum number of processes is running.
      ValueError: the process does not start.
    """
    message = json.dumps(dataclasses.asdict(self._limits)).encode()
    # Held during a fork, and during the start of the template process, about a
    # second; never while a grammar is compiled.
    with self._lock:
      if self.full():
        raise EngineFull(
          f'{self._max_processes} constraints are in use, the maximum; try '
          'again later',
          self._limits.compile_seconds,
        )
      server_end, worker_end = socket.socketpair()
      with worker_end:
        try:
          self._send_to_template(message, worker_end)
        except OSError:
          # The template process was killed.
          self._template = None
          self._send_to_template(message, worker_end)
      process = GrammarProcess(Connection(server_end.detach()), self._limits)
      self._alive.add(process)
    return process

  def _send_to_template(
    self, message: bytes, worker_end: socket.socket
  ) -> None:
    if self._template is None:
      self._template = _start_template(self._vocabulary)
    socket.send_fds(self._template, [message], [worker_end.fileno()])
    # A template process that is being killed still accepts messages.
    if not self._template.recv(8):
      raise ConnectionError('the template process has ended')


def _start_template(vocabulary: bytes) -> socket.socket:
  """Starts the template process.

  Raises:
    ValueError: the process does not start.
  """
  server_end, worker_end = socket.socketpair(
    socket.AF_UNIX, socket.SOCK_SEQPACKET
  )
  # -P keeps the modules beside the file out of sys.path.
  command = [
    sys.executable,
    '-P',
    grammar_worker.__file__,
    str(worker_end.fileno()),
  ]
  with worker_end:
    process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      pass_fds=[worker_end.fileno()],
      # Signals of the terminal are for the server alone.
      start_new_session=True,
    )
  try:
    with process.stdin:
      process.stdin.write(vocabulary)
    server_end.settimeout(_START_SECONDS)
    ready = server_end.recv(8) == b'ready'
  except OSError:
    ready = False
  if not ready:
    server_end.close()
    raise ValueError(
      'the process that compiles constraints does not start; its error is on '
      "the server's standard error"
    )
  return server_end
