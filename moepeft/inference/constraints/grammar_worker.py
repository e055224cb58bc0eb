# SPDX-License-Identifier: Apache-2.0
"""Processes that compile and follow grammars, each within limits of its own.

A grammar comes from a request, and some take llguidance minutes and gigabytes:
when they are compiled, or many tokens later, when a mask is computed. So each
grammar has a process that the kernel ends when it takes too much, and the
server goes on. This file is the process's program, and it imports neither JAX
nor moepeft, so that a process is small:

  server --(spawns once)--> template process --(forks per grammar)--> grammar

The template process reads the vocabulary once. For each grammar the server
sends it one end of a socket, and it forks a child that answers there. A child
ends when the server closes the socket.
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

# A request: an operation, the number of a matcher, an argument; then a text.
REQUEST = struct.Struct('<BIi')
COMPILE, COPY, DROP, MASK, FORCED, ACCEPT = range(6)
# A reply: flags of the matcher, then bytes.
ERROR, ACCEPTING, STOPPED, CONSUMED = 1, 2, 4, 8
# What a text may be tokenized after, for tokenizers that begin one otherwise.
_BEFORE = ('', '\n', '.', 'a')


@dataclasses.dataclass(frozen=True)
class ProcessLimits:
  """Limits of one grammar's process, which is ended beyond them.

  Attributes:
    compile_seconds: of processor time, to compile it and for its first mask. A
      schema of a thousand parts, the most that is taken, needs about one.
    step_seconds: of processor time, of one mask; usual ones take 0.1 ms.
    memory: bytes beyond those of the template process.
    states: of the grammar's lexer at most; about 2 kB each.
    fuel: expressions that the lexer begins with, at most; a hundred thousand
      take about 0.2 s.
  """

  compile_seconds: float = 4.0
  step_seconds: float = 1.0
  memory: int = 256 << 20
  states: int = 50_000
  fuel: int = 100_000


def speller(tokenizer: str) -> Callable[[str], Sequence[int]]:
  """A text's ids; any thread may call it.

  Args:
    tokenizer: tokenizer.json's text; '' for the vocabulary of bytes.
  """
  if not tokenizer:
    # Ids 0 to 2 are special ones.
    return lambda text: [byte + 3 for byte in text.encode()]
  # `transformers` sets what is cut and padded at each call, in which no other
  # thread may read the same tokenizer, so this one is made anew.
  import tokenizers

  backend = tokenizers.Tokenizer.from_str(tokenizer)
  backend.no_truncation()
  backend.no_padding()
  return lambda text: backend.encode(text, add_special_tokens=False).ids


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTable:
  """A vocabulary as bytes; v is the model's, which may be the wider one.

  Attributes:
    tokenizer: as `speller` takes it.
    later: v byte strings, what each token is inside of a text; b'' for special
      ones, those that are none, and ids that only the model has.
    first: the same of a text's first token, which decoders of SentencePiece's
      kind take a blank from.
  """

  tokenizer: str
  later: Sequence[bytes]
  first: Sequence[bytes]

  @functools.cached_property
  def spell(self) -> Callable[[str], Sequence[int]]:
    """Ids of a text as the tokenizer has them."""
    return speller(self.tokenizer)

  def encode(self, text: str) -> list[int]:
    """Ids whose bytes, inside of a text, are exactly this text's.

    As the tokenizer has them where it can, else the longest ones from the
    left; [] where no tokens make it up.
    """
    data = text.encode()
    for before in _BEFORE:
      ids = self._suffix(self.spell(before + text), data)
      if ids is not None:
        return ids
    return self._greedy(data)

  def _suffix(self, ids: Sequence[int], data: bytes) -> list[int] | None:
    """The last ids whose bytes are the data, if some are."""
    start = len(data)
    for at in range(len(ids) - 1, -1, -1):
      piece = self._of(ids[at])
      start -= len(piece)
      if not piece or start < 0 or data[start : start + len(piece)] != piece:
        return None
      if not start:
        return [int(i) for i in ids[at:]]
    return None

  def _of(self, token: int) -> bytes:
    return self.later[token] if token < len(self.later) else b''

  def _greedy(self, data: bytes) -> list[int]:
    ids, at = [], 0
    longest = max(map(len, self._ids), default=0)
    while at < len(data):
      sizes = range(min(longest, len(data) - at), 0, -1)
      size = next((n for n in sizes if data[at : at + n] in self._ids), None)
      if size is None:
        return []
      ids.append(self._ids[data[at : at + size]])
      at += size
    return ids

  @functools.cached_property
  def _ids(self) -> dict[bytes, int]:
    pairs = enumerate(self.later)
    return {piece: i for i, piece in reversed(list(pairs)) if piece}


class _Tokenizer:
  """A vocabulary as llguidance reads it.

  Attributes:
    tokens: bytes of the ids of the model, of further ids that
      `constraints` needs, and last of one that stands for what the vocabulary
      cannot write.
  """

  # Attributes that llguidance asks a tokenizer for.
  is_tokenizer_wrapper = True
  bos_token_id = None

  def __init__(self, pieces: TokenTable, tokens: list[bytes], ends: list[int]):
    self._pieces, self.tokens = pieces, tokens
    self.eos_token_id = ends[0]
    self.special_token_ids = [i for i, x in enumerate(tokens) if not x]

  def __call__(self, text: str) -> list[int]:
    unknown = len(self.tokens) - 1
    return self._pieces.encode(text) or [unknown] * bool(text)


def vocabulary(
  tokenizer: str, size: int, tokens: Sequence[bytes], ends: Sequence[int]
) -> bytes:
  """The message that the template process reads from standard input."""
  head = json.dumps(
    {
      'tokenizer': tokenizer,
      'size': size,
      'lengths': [len(token) for token in tokens],
      'ends': [int(end) for end in ends],
    }
  ).encode()
  return struct.pack('<Q', len(head)) + head + b''.join(tokens)


def _read_vocabulary(message: bytes) -> tuple[_Tokenizer, list[int]]:
  (length,) = struct.unpack_from('<Q', message)
  head, at = json.loads(message[8 : 8 + length]), 8 + length
  tokens = []
  for size in head['lengths']:
    tokens.append(message[at : at + size])
    at += size
  later = tokens[: head['size']]
  pieces = TokenTable(head['tokenizer'], later, later)
  return _Tokenizer(pieces, tokens, head['ends']), head['ends']


def template_process(control: socket.socket, message: bytes) -> None:
  """Forks a process for each socket that comes, until the server is gone.

  Args:
    control: brings a grammar's limits as JSON, and its socket.
    message: the vocabulary.
  """
  import llguidance

  # Ctrl-C at a terminal is the server's to answer; children are not waited for.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)
  wrapper, ends = _read_vocabulary(message)
  tokenizer = llguidance.LLTokenizer(wrapper, eos_token=ends)
  wrapper('a')  # reads the tokenizer here, for all children
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
        pass  # the server needs it no more
      finally:
        os._exit(0)
    os.close(descriptors[0])


class _GrammarProcess:
  """Answers requests about one grammar; matcher 0 is at its beginning."""

  def __init__(
    self, channel: Connection, tokenizer: Any, limits: ProcessLimits
  ):
    self._channel, self._tokenizer = channel, tokenizer
    self._limits, self._matchers = limits, {}

  def run(self) -> None:
    limits = self._limits
    # The kernel ends the process, whatever native code is doing.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(open('/proc/self/statm').read().split()[0])
    memory = pages * resource.getpagesize() + limits.memory
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    while True:
      message = self._channel.recv_bytes()
      operation, number, argument = REQUEST.unpack_from(message)
      text = message[REQUEST.size :].decode()
      compiling = operation == COMPILE
      seconds = limits.compile_seconds if compiling else limits.step_seconds
      signal.setitimer(signal.ITIMER_PROF, seconds)
      reply = self._answer(operation, number, argument, text)
      signal.setitimer(signal.ITIMER_PROF, 0)
      if reply is not None:
        self._channel.send_bytes(reply)

  def _answer(
    self, operation: int, number: int, argument: int, text: str
  ) -> bytes | None:
    body, flags = b'', 0
    if operation == DROP:
      self._matchers.pop(number, None)
      return None
    if operation == COMPILE:
      self._matchers[number] = self._compiled(text)
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

  def _compiled(self, grammar: str) -> Any:
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
      # A first mask may take as much as all that was done before.
      matcher.deep_copy().compute_bitmask()
    return matcher


if __name__ == '__main__':
  template_process(
    socket.socket(fileno=int(sys.argv[1])), sys.stdin.buffer.read()
  )
