# SPDX-License-Identifier: Apache-2.0
"""Constraints on answers as masks over the vocabulary: JSON schemas, regular
expressions, grammars, choices and calls of tools, by `llguidance`.

Each grammar is compiled and followed in a process of its own (`grammar_pool`),
which the kernel ends beyond its limits: a schema may take minutes and
gigabytes, and no other request waits for it. In that process a mask of 49,152
tokens (SmolLM2's) takes 0.08 ms of processor time in the mean, 0.6 ms at most
in 99 of 100 cases, over thirty schemas and random answers; a schema takes 4 ms
to compile, once. Letter: v the model's vocabulary.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer
from moepeft.inference import json_schema as inference_json_schema
from moepeft.inference.api import Constraint, EngineFull
from moepeft.inference.constraints import lark, tool_grammar
from moepeft.inference.constraints.grammar_pool import (
  GrammarLimit,
  GrammarPool,
  GrammarProcess,
  Matcher,
)
from moepeft.inference.constraints.grammar_worker import (
  ProcessLimits,
  TokenTable,
  vocabulary,
)
from moepeft.inference.token_bytes import TokenBytes
from moepeft.inference.tools.tools import Choice, Style, ToolSpec


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of compiling and following grammars.

  Attributes:
    cached: compiled grammars that are kept, those used last.
    processes: grammars in use at once, those that are being compiled and those
      that are kept among them.
    regex: characters of a regular expression at most.
    options: of a choice, at most.
    process: limits of each grammar's process.
  """

  cached: int = 16
  processes: int = 48
  regex: int = 10_000
  options: int = 10_000
  process: ProcessLimits = ProcessLimits()


class GrammarConstraint:
  """A `Constraint`: the state of one answer in a grammar.

  The text is that of the answer's ids by themselves; where the tokenizer takes
  a blank from a text's beginning, the first token may have one.
  """

  def __init__(
    self, matcher: Matcher, tokens: '_Tokens', forget: Callable[[], None]
  ):
    """
    Args:
      forget: called where the matcher fails, since its lexer, which all
        answers of a grammar share, may have come to a limit.
    """
    self._matcher, self._tokens, self._forget = matcher, tokens, forget
    self._begun = False

  def mask(self) -> np.ndarray:
    """bool [v]; where the text may end, the ends are True.

    Raises:
      ValueError: the grammar has grown too complex, or no token of the
        vocabulary goes on.
    """
    packed = self._matcher.bitmask()
    if self._matcher.error:
      self._fail('no token of the vocabulary goes on from here')
    whole = self._tokens.bits(packed)
    if self._begun:
      mask = whole[: self._tokens.size] & self._tokens.usable
    else:
      mask = self._tokens.beginning(whole, self._matcher)
    if not mask.any():
      self._fail('no token of the vocabulary goes on from here')
    return mask

  def accept(self, token: int) -> bool:
    """Goes on by a token; whether the text must end.

    Raises:
      ValueError: the mask does not allow it.
    """
    if token in self._tokens.ends and self._matcher.accepting:
      return True
    inner = token if self._begun else self._tokens.inner(token)
    self._begun = True
    if inner != _NO_TOKEN and not self._matcher.consume(inner):
      self._fail(f'token {token} is not allowed here')
    return self._matcher.stopped

  def _fail(self, otherwise: str) -> None:
    self._forget()
    reason = _reason(self._matcher.error)
    if not reason or reason.startswith(('Parser Error', 'NoExtension')):
      reason = otherwise
    raise ValueError(
      f'the constrained answer cannot go on ({reason}); use a simpler '
      'constraint, or another model'
    )


class Compiler:
  """Makes constraints for a vocabulary; each call gives a fresh one.

  Any thread may call it; what it makes is for one thread. White space of JSON
  is a blank after a comma or a colon, at most.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    vocab: int,
    ends: tuple[int, ...],
    limits: Limits = Limits(),
  ):
    """
    Args:
      vocab: v, which may be larger than the vocabulary.
      ends: ids that end an answer.

    Raises:
      ValueError: llguidance is not installed, there are no ends, or the
        vocabulary's tokens have no texts of their own.
    """
    try:
      import llguidance
    except ImportError:
      raise ValueError(
        'constrained answers need a package that is not installed: pip install '
        "'llguidance>=1.3,<2'"
      ) from None
    if not ends or not all(0 <= end < vocab for end in ends):
      raise ValueError(
        f'expected ids that end answers, below the {vocab:,} of the '
        f'vocabulary, got {tuple(ends)}'
      )
    self._library, self._limits = llguidance, limits
    self._tokens = _Tokens(_table(tokenizer, vocab), tuple(ends))
    self._pool = GrammarPool(
      self._tokens.vocabulary(), limits.processes, limits.process
    )
    # Grammars that are compiled or being compiled, the last used at the end.
    self._cache: collections.OrderedDict[str, Future[GrammarProcess]]
    self._cache = collections.OrderedDict()
    # Held for a look into the cache, never while a grammar is compiled.
    self._lock = threading.Lock()
    self._waiting = threading.BoundedSemaphore(limits.processes)

  def json_schema(self, schema: Any, strict: bool = True) -> Constraint:
    """JSON that fits a schema; see `json_schemas.prepared`.

    Args:
      strict: whether keywords that cannot be kept are an error; else they are
        left out.

    Raises:
      ValueError: the schema cannot be kept, or no text fits it.
    """
    text = inference_json_schema.prepared(schema, strict)
    grammar = self._library.LLMatcher.grammar_from_json_schema(text)
    return self._constraint(grammar, 'the JSON schema')

  def json_object(self) -> Constraint:
    """Any JSON object."""
    return self.json_schema({'type': 'object'})

  def regex(self, text: str) -> Constraint:
    """A text that a regular expression (of Rust's kind) matches as a whole.

    Raises:
      ValueError: it is none, or too long.
    """
    if len(text) > self._limits.regex:
      raise ValueError(
        f'the regular expression has {len(text):,} characters, expected at '
        f'most {self._limits.regex:,}; make it shorter'
      )
    grammar = self._library.LLMatcher.grammar_from_regex(text)
    return self._constraint(grammar, 'the regular expression')

  def grammar(self, text: str) -> Constraint:
    """A text of a grammar in llguidance's kind of Lark.

    White space in its %json is bounded as elsewhere; else it is the grammar's.

    Raises:
      ValueError: it is none, or too long.
    """
    grammar = self._library.LLMatcher.grammar_from_lark(lark.bounded(text))
    return self._constraint(grammar, 'the grammar')

  def choice(self, options: Sequence[str]) -> Constraint:
    """One of several texts.

    Raises:
      ValueError: there are none, too many, or one is no text or empty.
    """
    if isinstance(options, str) or not len(options):
      raise ValueError('a choice is a list of texts; expected at least one')
    if len(options) > self._limits.options:
      raise ValueError(
        f'the choice has {len(options):,} options, expected at most '
        f'{self._limits.options:,}; leave some out'
      )
    wrong = [
      option for option in options if not isinstance(option, str) or not option
    ]
    if wrong:
      raise ValueError(
        'the options of a choice are texts that are not empty, got '
        f'{wrong[0]!r}'
      )
    text = 'start: ' + ' | '.join(lark.literal(option) for option in options)
    grammar = self._library.LLMatcher.grammar_from_lark(text)
    return self._constraint(grammar, 'the choice')

  def tools(
    self,
    tools: Sequence[ToolSpec],
    choice: Choice,
    parallel: bool,
    style: Style,
  ) -> Constraint:
    """Constrains tool calls; see `tool_grammar.build_grammar`.

    Raises:
      ValueError: the parameters of a strict tool cannot be enforced.
    """
    text = tool_grammar.build_grammar(tools, choice, parallel, style)
    grammar = self._library.LLMatcher.grammar_from_lark(text)
    return self._constraint(grammar, 'the tools')

  def _constraint(self, grammar: str, label: str) -> GrammarConstraint:
    # Threads that wait for a grammar are few, so that others are left.
    if not self._waiting.acquire(blocking=False):
      raise EngineFull(
        f'{self._limits.processes} requests wait for their constraints to be '
        'compiled, as many as may; try again in a moment',
        self._limits.process.compile_seconds,
      )
    try:
      process = self._process(grammar, label)
    finally:
      self._waiting.release()
    return GrammarConstraint(
      process.matcher(), self._tokens, lambda: self._forget(grammar, process)
    )

  def _process(self, grammar: str, label: str) -> GrammarProcess:
    """A grammar's process: one that is kept, or a new one."""
    with self._lock:
      future, first = self._cache.get(grammar), False
      if future is None:
        future, first = Future(), True
        self._cache[grammar] = future
      self._cache.move_to_end(grammar)
      while len(self._cache) > self._limits.cached or (
        first and self._pool.full() and len(self._cache) > 1
      ):
        # Answers that still follow it keep its process.
        self._cache.popitem(last=False)
    if first:
      try:
        future.set_result(self._compile(grammar, label))
      except BaseException as error:
        self._forget(grammar)
        future.set_exception(error)
    return future.result()

  def _compile(self, grammar: str, label: str) -> GrammarProcess:
    process = self._pool.process()
    try:
      error = process.compile(grammar)
    except GrammarLimit as e:
      raise ValueError(
        f'{label} cannot be compiled: {e}; make it simpler'
      ) from None
    if error:
      raise ValueError(
        f'{label} cannot be followed: {_reason(error)}; change it'
      )
    try:
      GrammarConstraint(process.matcher(), self._tokens, lambda: None).mask()
    except ValueError:
      raise ValueError(
        f'{label} allows no text that the vocabulary can write; change it'
      ) from None
    return process

  def _forget(
    self, grammar: str, process: GrammarProcess | None = None
  ) -> None:
    """Leaves a grammar out of the cache; of a process, only where it is its."""
    with self._lock:
      future = self._cache.get(grammar)
      if future and (process is None or _result(future) is process):
        del self._cache[grammar]


def _result(future: Future) -> GrammarProcess | None:
  return future.result() if future.done() else None


# In place of an id: a token that adds nothing.
_NO_TOKEN = -1


def _table(tokenizer: Tokenizer, size: int) -> TokenTable:
  """The bytes of a model's tokens, and the tokenizer for the processes."""
  first, later = TokenBytes(tokenizer).table(size)
  text = ''
  if isinstance(tokenizer, HuggingFaceTokenizer):
    text = tokenizer.tokenizer.backend_tokenizer.to_str()
  return TokenTable(text, later, first)


class _Tokens:
  """A vocabulary's ids, and those that llguidance has for them.

  Tokens that are others at a text's beginning ('▁a', which is 'a' there) are
  found by an id of the same bytes, if need be one above v.
  """

  def __init__(self, table: TokenTable, ends: tuple[int, ...]):
    self.ends, self.size = ends, len(table.later)
    # An end is one wherever it stands, though it be a line's.
    later, first = (
      [b'' if i in ends else piece for i, piece in enumerate(texts)]
      for texts in (table.later, table.first)
    )
    self._pieces = dataclasses.replace(table, later=later, first=first)
    ids = {piece: i for i, piece in reversed(list(enumerate(later))) if piece}
    self._inner, self._bytes = np.arange(self.size), list(later)
    for i, (now, then) in enumerate(zip(first, later, strict=True)):
      if now and now not in ids:
        ids[now] = len(self._bytes)
        self._bytes.append(now)
      if now != then:
        self._inner[i] = ids.get(now, _NO_TOKEN)
    self._alike = first == later
    # For a text that the vocabulary cannot write.
    self._bytes.append(b'')
    self.usable = np.array([bool(x) for x in later])
    self.usable[list(ends)] = True

  def vocabulary(self) -> bytes:
    """The message for the processes that follow grammars."""
    return vocabulary(self._pieces.tokenizer, self.size, self._bytes, self.ends)

  def bits(self, packed: bytes) -> np.ndarray:
    """bool [v and more], of llguidance's one bit a token."""
    bits = np.frombuffer(packed, np.uint8)
    count = len(self._bytes)
    return np.unpackbits(bits, count=count, bitorder='little').view(bool)

  def inner(self, token: int) -> int:
    """The id of the bytes that a token is at the beginning, or _NO_TOKEN."""
    return int(self._inner[token])

  def beginning(self, whole: np.ndarray, matcher: Matcher) -> np.ndarray:
    """bool [v], what may come first."""
    if self._alike:
      return whole[: self.size] & self.usable
    mask = whole[self._inner] & (self._inner >= 0)
    # A blank alone leaves the text as it is.
    mask[self._inner == _NO_TOKEN] = (whole[: self.size] & self.usable).any()
    # Where only one text is possible, llguidance allows the one token with
    # which it would go on, not the one with which it begins.
    forced = matcher.forced()
    ids = self._pieces.spell(forced.decode(errors='ignore'))
    if forced and ids and ids[0] < self.size:
      first = self._pieces.first[ids[0]]
      mask[ids[0]] |= bool(first) and forced.startswith(first)
    return mask & self.usable


def _reason(message: str) -> str:
  """An error of llguidance in a line."""
  if 'oneOf constraints are not supported' in message:
    return (
      "'oneOf' is kept only where its options differ by type or by a constant: "
      "use 'anyOf'"
    )
  if message.startswith('panic'):
    return 'the compiler failed, as it does for tokens that there are not'
  lines = [line.strip() for line in message.splitlines()]
  lines = [line for line in lines if line and '<non-verbose' not in line]
  error = next((x for x in lines if x.startswith('error: ')), '')
  return (error.removeprefix('error: ') or ''.join(lines[:1]))[:200]
