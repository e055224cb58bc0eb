# SPDX-License-Identifier: Apache-2.0
"""The server's side of grammar processes: starts, asks and ends them."""

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

# A process that others keep from the processor has this many times longer.
_WAIT = 4.0
# Seconds for the template process to read the vocabulary.
_START = 60


class Matcher:
  """A place in a grammar, held by its process; for one answer.

  Attributes:
    error: why it cannot go on; '' while it can.
    accepting: whether the text may end here.
    stopped: whether it must.
  """

  def __init__(self, process: 'GrammarProcess', number: int):
    self._process, self._number = process, number
    self.error, self.accepting, self.stopped = '', False, False
    self._ask(grammar_worker.COPY)

  def bitmask(self) -> bytes:
    """One bit a token that may come next; b'' where there is an error."""
    return self._ask(grammar_worker.MASK)[1]

  def forced(self) -> bytes:
    """Bytes that the text must go on with."""
    return self._ask(grammar_worker.FORCED)[1]

  def consume(self, token: int) -> bool:
    """Goes on by a token; False where it is not allowed."""
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
    # Told with the next request: this may run on any thread, in any lock.
    self._process.dropped.append(self._number)


class GrammarLimit(ValueError):
  """A grammar's process was ended, since it took too much."""


class GrammarProcess:
  """A grammar that is compiled in a process, and ends with this object.

  Attributes:
    dropped: numbers of matchers that are needed no more.
  """

  def __init__(self, channel: Connection, limits: grammar_worker.ProcessLimits):
    self._channel, self._limits = channel, limits
    # Requests that compile the same grammar and the engine ask it, in turn;
    # each turn is short, as the process has a limit.
    self._lock = threading.Lock()
    self._numbers = itertools.count(1)
    self._failure = ''
    self.dropped: collections.deque[int] = collections.deque()

  def compile(self, grammar: str) -> str:
    """Compiles; why it cannot be, else ''.

    Raises:
      GrammarLimit: it takes too much time or memory.
    """
    flags, body = self.ask(grammar_worker.COMPILE, 0, 0, grammar)
    return body.decode(errors='replace') if flags & grammar_worker.ERROR else ''

  def matcher(self) -> Matcher:
    """A matcher at the beginning."""
    return Matcher(self, next(self._numbers))

  def ask(
    self, operation: int, number: int, argument: int = 0, text: str = ''
  ) -> tuple[int, bytes]:
    """Flags and bytes of the reply.

    Raises:
      GrammarLimit: the process has ended, now or before.
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
        if not self._channel.poll(_WAIT * seconds + 1):
          raise EOFError
        reply = self._channel.recv_bytes()
      except (EOFError, OSError):
        self._channel.close()
        self._failure = (
          f'it takes more than {seconds:g} s of processor time or '
          f'{limits.memory >> 20:,} MB of memory'
        )
        raise GrammarLimit(self._failure) from None
    return reply[0], reply[1:]

  def _send(
    self, operation: int, number: int, argument: int = 0, text: str = ''
  ) -> None:
    head = grammar_worker.REQUEST.pack(operation, number, argument)
    self._channel.send_bytes(head + text.encode())


class GrammarPool:
  """Makes grammar processes for one vocabulary, so many at once at most."""

  def __init__(
    self,
    vocabulary: bytes,
    processes: int,
    limits: grammar_worker.ProcessLimits,
  ):
    """
    Args:
      vocabulary: as `grammar_worker.vocabulary` writes it.
      processes: alive at once.
    """
    self._vocabulary, self._most, self._limits = vocabulary, processes, limits
    self._lock = threading.Lock()
    self._alive: weakref.WeakSet[GrammarProcess] = weakref.WeakSet()
    self._template: socket.socket | None = None

  def full(self) -> bool:
    return len(self._alive) >= self._most

  def process(self) -> GrammarProcess:
    """A process that no grammar has yet.

    Raises:
      Full: too many are alive.
      ValueError: no process can be started.
    """
    message = json.dumps(dataclasses.asdict(self._limits)).encode()
    # Held for a fork, and the first time for the start, a second; never while
    # a grammar is compiled.
    with self._lock:
      if self.full():
        raise EngineFull(
          f'{self._most} constraints are in use at once, as many as are kept; '
          'try again in a moment',
          self._limits.compile_seconds,
        )
      server_end, worker_end = socket.socketpair()
      with worker_end:
        try:
          self._pass_on(message, worker_end)
        except OSError:
          # The template process is gone, as by an operator's kill.
          self._template = None
          self._pass_on(message, worker_end)
      process = GrammarProcess(Connection(server_end.detach()), self._limits)
      self._alive.add(process)
    return process

  def _pass_on(self, message: bytes, end: socket.socket) -> None:
    if self._template is None:
      self._template = _template(self._vocabulary)
    socket.send_fds(self._template, [message], [end.fileno()])


def _template(vocabulary: bytes) -> socket.socket:
  """Starts the template process.

  Raises:
    ValueError: it does not start.
  """
  server_end, worker_end = socket.socketpair(
    socket.AF_UNIX, socket.SOCK_SEQPACKET
  )
  # -P: no module beside that file may stand in for one of the same name.
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
      # A signal to the terminal's group is the server's.
      start_new_session=True,
    )
  try:
    with process.stdin:
      process.stdin.write(vocabulary)
    server_end.settimeout(_START)
    ready = server_end.recv(8) == b'ready'
    server_end.settimeout(None)
  except OSError:
    ready = False
  if not ready:
    server_end.close()
    raise ValueError(
      'the process that compiles constraints does not start; its error is on '
      "the server's standard error"
    )
  return server_end
