# SPDX-License-Identifier: Apache-2.0
"""The processes that compile and follow grammars.

Some grammars of requests take llguidance minutes and gigabytes, when they are
compiled or when a later mask is computed. Each grammar therefore has a process
with limits, which the kernel kills if it exceeds them. This file is the program
of that process. It imports neither JAX nor moepeft, so that a process is small:

  server --(spawns once)--> template process --(forks per grammar)--> grammar

The template process reads the vocabulary once. For each grammar the server
sends it one end of a socket, and it forks a child that answers on the socket.
A child exits when the server closes the socket.
"""

import dataclasses
import functools
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

# The header of a request: operation, matcher number, argument. A text follows.
REQUEST = struct.Struct('<BIi')
COMPILE, COPY, DROP, MASK, FORCED, ACCEPT = range(6)
# The flags of a reply, its first byte. Bytes follow.
ERROR, ACCEPTING, STOPPED, CONSUMED = 1, 2, 4, 8
# Prefixes for encoding a text as it is encoded inside another text.
_PREFIXES = ('', '\n', '.', 'a')


@dataclasses.dataclass(frozen=True)
class ProcessLimits:
  """Limits of a grammar's process.

  Attributes:
    compile_seconds: CPU time for compiling and for the first mask. The largest
      schema, with a thousand subschemas, takes about one second.
    step_seconds: CPU time for a mask; most take 0.1 ms.
    memory: bytes beyond the memory of the template process.
    states: the maximum number of states of the lexer, about 2 kB each.
    fuel: the maximum number of initial expressions of the lexer; a hundred
      thousand take about 0.2 s.
  """

  compile_seconds: float = 4.0
  step_seconds: float = 1.0
  memory: int = 256 << 20
  states: int = 50_000
  fuel: int = 100_000


def make_encoder(tokenizer: str) -> Callable[[str], Sequence[int]]:
  """Makes a thread-safe function that encodes a text.

  Args:
    tokenizer: the text of tokenizer.json; '' for the byte tokenizer.
  """
  if not tokenizer:
    # Ids 0 to 2 are special tokens.
    return lambda text: [byte + 3 for byte in text.encode()]
  # A new tokenizer, because `transformers` sets truncation and padding at each
  # call, which is not thread-safe.
  import tokenizers

  backend = tokenizers.Tokenizer.from_str(tokenizer)
  backend.no_truncation()
  backend.no_padding()
  return lambda text: backend.encode(text, add_special_tokens=False).ids


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTable:
  """The bytes of the tokens of a vocabulary.

  v is the size of the model's vocabulary, which may be padded.

  Attributes:
    tokenizer: the argument of `make_encoder`.
    later: v byte strings, each token's bytes inside a text; b'' for special
      tokens, unused ids and padding.
    first: the same for the first token of a text, from which decoders of the
      SentencePiece kind remove a leading space.
  """

  tokenizer: str
  later: Sequence[bytes]
  first: Sequence[bytes]

  @functools.cached_property
  def encode_as_tokenizer(self) -> Callable[[str], Sequence[int]]:
    """Encodes a text by the tokenizer."""
    return make_encoder(self.tokenizer)

  def encode(self, text: str) -> list[int]:
    """Encodes a text to ids whose bytes inside a text are exactly its bytes.

    The ids are the tokenizer's if possible, otherwise the longest ones from the
    left; [] if no tokens make up the text.
    """
    data = text.encode()
    for prefix in _PREFIXES:
      ids = self._match_suffix(self.encode_as_tokenizer(prefix + text), data)
      if ids is not None:
        return ids
    return self._greedy(data)

  def _match_suffix(self, ids: Sequence[int], data: bytes) -> list[int] | None:
    """Returns the last ids whose bytes are `data`, or None."""
    start = len(data)
    for at in range(len(ids) - 1, -1, -1):
      token = self._token_bytes(ids[at])
      start -= len(token)
      if not token or start < 0 or data[start : start + len(token)] != token:
        return None
      if not start:
        return [int(i) for i in ids[at:]]
    return None

  def _token_bytes(self, token: int) -> bytes:
    return self.later[token] if token < len(self.later) else b''

  def _greedy(self, data: bytes) -> list[int]:
    ids, at = [], 0
    longest = max(map(len, self._id_by_bytes), default=0)
    while at < len(data):
      sizes = range(min(longest, len(data) - at), 0, -1)
      size = next(
        (n for n in sizes if data[at : at + n] in self._id_by_bytes), None
      )
      if size is None:
        return []
      ids.append(self._id_by_bytes[data[at : at + size]])
      at += size
    return ids

  @functools.cached_property
  def _id_by_bytes(self) -> dict[bytes, int]:
    pairs = enumerate(self.later)
    return {token: i for i, token in reversed(list(pairs)) if token}


class _Tokenizer:
  """A tokenizer with the interface that llguidance expects.

  Attributes:
    tokens: the bytes of the model's ids, of the additional ids of
      `grammar._Tokens`, and of an id for unknown text.
  """

  # Attributes that llguidance reads.
  is_tokenizer_wrapper = True
  bos_token_id = None

  def __init__(
    self, token_table: TokenTable, tokens: list[bytes], eos_token_ids: list[int]
  ):
    self._token_table, self.tokens = token_table, tokens
    self.eos_token_id = eos_token_ids[0]
    self.special_token_ids = [i for i, x in enumerate(tokens) if not x]

  def __call__(self, text: str) -> list[int]:
    unknown = len(self.tokens) - 1
    return self._token_table.encode(text) or [unknown] * bool(text)


def pack_vocabulary(
  tokenizer: str,
  size: int,
  tokens: Sequence[bytes],
  eos_token_ids: Sequence[int],
) -> bytes:
  """Packs the message that the template process reads from standard input."""
  header = json.dumps(
    {
      'tokenizer': tokenizer,
      'size': size,
      'lengths': [len(token) for token in tokens],
      'ends': [int(end) for end in eos_token_ids],
    }
  ).encode()
  return struct.pack('<Q', len(header)) + header + b''.join(tokens)


def _read_vocabulary(message: bytes) -> tuple[_Tokenizer, list[int]]:
  (length,) = struct.unpack_from('<Q', message)
  header, at = json.loads(message[8 : 8 + length]), 8 + length
  tokens = []
  for size in header['lengths']:
    tokens.append(message[at : at + size])
    at += size
  later = tokens[: header['size']]
  token_table = TokenTable(header['tokenizer'], later, later)
  return _Tokenizer(token_table, tokens, header['ends']), header['ends']


def template_process(control: socket.socket, message: bytes) -> None:
  """Forks a process for each socket, until the server exits.

  Args:
    control: receives the limits of each grammar, as JSON, and its socket.
    message: the vocabulary, from `pack_vocabulary`.
  """
  import llguidance

  # The server handles Ctrl-C; the kernel reaps the children.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)
  tokenizer_wrapper, eos_token_ids = _read_vocabulary(message)
  tokenizer = llguidance.LLTokenizer(tokenizer_wrapper, eos_token=eos_token_ids)
  tokenizer_wrapper('a')  # loads the tokenizer before the forks
  control.send(b'ready')
  while True:
    limits, descriptors, _, _ = socket.recv_fds(control, 1024, 1)
    if not limits:
      return
    if os.fork() == 0:
      control.close()
      try:
        _GrammarProcess(
          Connection(descriptors[0]),
          tokenizer,
          ProcessLimits(**json.loads(limits)),
        ).run()
      except (EOFError, OSError):
        pass  # the server has closed the socket
      finally:
        os._exit(0)
    os.close(descriptors[0])
    control.send(b'forked')


class _GrammarProcess:
  """Answers the requests about a grammar; matcher 0 is its initial state."""

  def __init__(
    self, connection: Connection, tokenizer: Any, limits: ProcessLimits
  ):
    self._connection, self._tokenizer = connection, tokenizer
    self._limits, self._matchers = limits, {}

  def run(self) -> None:
    limits = self._limits
    # By default SIGPROF kills the process, even inside native code.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(open('/proc/self/statm').read().split()[0])
    memory = pages * resource.getpagesize() + limits.memory
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    while True:
      message = self._connection.recv_bytes()
      operation, number, argument = REQUEST.unpack_from(message)
      text = message[REQUEST.size :].decode()
      compiling = operation == COMPILE
      seconds = limits.compile_seconds if compiling else limits.step_seconds
      signal.setitimer(signal.ITIMER_PROF, seconds)
      reply = self._answer(operation, number, argument, text)
      signal.setitimer(signal.ITIMER_PROF, 0)
      if reply is not None:
        self._connection.send_bytes(reply)

  def _answer(
    self, operation: int, number: int, argument: int, text: str
  ) -> bytes | None:
    body, flags = b'', 0
    if operation == DROP:
      self._matchers.pop(number, None)
      return None
    if operation == COMPILE:
      self._matchers[number] = self._compile(text)
    elif operation == COPY:
      self._matchers[number] = self._matchers[0].deep_copy()
    matcher = self._matchers[number]
    if operation == MASK:
      body = matcher.compute_bitmask()
    elif operation == FORCED:
      body = matcher.compute_ff_bytes()
    elif operation == ACCEPT:
      flags |= CONSUMED * matcher.consume_token(argument)
    if matcher.is_error():
      return bytes([flags | ERROR]) + matcher.get_error().encode()
    flags |= ACCEPTING * matcher.is_accepting()
    flags |= STOPPED * matcher.is_stopped()
    return bytes([flags]) + body

  def _compile(self, grammar: str) -> Any:
    import llguidance

    limits = llguidance.LLParserLimits(
      max_lexer_states=self._limits.states,
      initial_lexer_fuel=self._limits.fuel,
      verbose_errors=False,
    )
    matcher = llguidance.LLMatcher(
      self._tokenizer, grammar, log_level=0, limits=limits
    )
    if not matcher.is_error():
      # The first mask may take as long as the compilation.
      matcher.deep_copy().compute_bitmask()
    return matcher


if __name__ == '__main__':
  template_process(
    socket.socket(fileno=int(sys.argv[1])), sys.stdin.buffer.read()
  )
