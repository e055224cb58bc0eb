# SPDX-License-Identifier: Apache-2.0
"""Constrained decoding by `llguidance`: masks over the vocabulary.

The constraints are JSON schemas, regular expressions, grammars, choices and
tool calls. Each grammar is compiled and followed in its own process
(`grammar_pool`), which the kernel kills beyond its limits, since a schema may
take minutes and gigabytes. In that process a mask of SmolLM2's 49,152 tokens
takes 0.08 ms of CPU time on average, with a 99th percentile of 0.6 ms, over
thirty schemas and random answers; compiling a schema takes 4 ms. v is the size
of the model's vocabulary.
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
  pack_vocabulary,
)
from moepeft.inference.token_bytes import TokenBytes
from moepeft.inference.tools.tools import CallFormat, ToolChoice, ToolSpec


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of grammars.

  Attributes:
    cached: the number of compiled grammars in the LRU cache.
    processes: the maximum number of grammars in use, compiling or cached.
    regex: the maximum number of characters of a regular expression.
    options: the maximum number of options of a choice.
    process: the limits of each grammar's process.
  """

  cached: int = 16
  processes: int = 48
  regex: int = 10_000
  options: int = 10_000
  process: ProcessLimits = ProcessLimits()


class GrammarConstraint:
  """A `Constraint`: the state of one answer in a grammar.

  The constrained text is that of the answer's ids alone. If the tokenizer
  removes a leading space, the first token may have one.
  """

  def __init__(
    self, matcher: Matcher, tokens: '_Tokens', forget: Callable[[], None]
  ):
    """
    Args:
      forget: called if the matcher fails, to drop the grammar from the cache;
        its shared lexer may have reached a limit.
    """
    self._matcher, self._tokens, self._forget = matcher, tokens, forget
    self._started = False

  def mask(self) -> np.ndarray:
    """bool [v], True for the allowed tokens; eos tokens if the text may end.

    Raises:
      ValueError: the grammar has become too complex, or no token of the
        vocabulary can continue the text.
    """
    packed = self._matcher.bitmask()
    if self._matcher.error:
      self._fail('no token of the vocabulary goes on from here')
    allowed = self._tokens.unpack_mask(packed)
    if self._started:
      mask = allowed[: self._tokens.size] & self._tokens.usable
    else:
      mask = self._tokens.mask_at_start(allowed, self._matcher)
    if not mask.any():
      self._fail('no token of the vocabulary goes on from here')
    return mask

  def accept(self, token: int) -> bool:
    """Advances by a token; returns True if the text must end.

    Raises:
      ValueError: the mask does not allow the token.
    """
    if token in self._tokens.eos_token_ids and self._matcher.accepting:
      return True
    matcher_id = token if self._started else self._tokens.id_at_start(token)
    self._started = True
    if matcher_id != _NO_TOKEN and not self._matcher.consume(matcher_id):
      self._fail(f'token {token} is not allowed here')
    return self._matcher.stopped

  def _fail(self, default_reason: str) -> None:
    self._forget()
    reason = _reason(self._matcher.error)
    if not reason or reason.startswith(('Parser Error', 'NoExtension')):
      reason = default_reason
    raise ValueError(
      f'the constrained answer cannot go on ({reason}); use a simpler '
      'constraint, or another model'
    )


class Compiler:
  """Compiles constraints for a vocabulary.

  It is thread-safe; each constraint is for one thread. JSON has at most a space
  after a comma or a colon as white space.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    vocab: int,
    eos_token_ids: tuple[int, ...],
    limits: Limits = Limits(),
  ):
    """
    Args:
      vocab: the size of the model's vocabulary, v.
      eos_token_ids: ids that end an answer.

    Raises:
      ValueError: llguidance is not installed, there are no eos tokens, or the
        tokenizer does not decode tokens one by one.
    """
    try:
      import llguidance
    except ImportError:
      raise ValueError(
        'constrained answers need a package that is not installed: pip install '
        "'llguidance>=1.3,<2'"
      ) from None
    if not eos_token_ids or not all(0 <= end < vocab for end in eos_token_ids):
      raise ValueError(
        f'expected ids that end answers, below the {vocab:,} of the '
        f'vocabulary, got {tuple(eos_token_ids)}'
      )
    self._library, self._limits = llguidance, limits
    self._tokens = _Tokens(_make_table(tokenizer, vocab), tuple(eos_token_ids))
    self._pool = GrammarPool(
      self._tokens.vocabulary(), limits.processes, limits.process
    )
    # Grammars that are compiled or compiling, the least recently used first.
    self._cache: collections.OrderedDict[str, Future[GrammarProcess]]
    self._cache = collections.OrderedDict()
    # Guards the cache; not held while a grammar is compiled.
    self._lock = threading.Lock()
    self._waiting_slots = threading.BoundedSemaphore(limits.processes)

  def json_schema(self, schema: Any, strict: bool = True) -> Constraint:
    """Compiles a JSON schema; see `json_schema.prepare`.

    Args:
      strict: whether unsupported keywords are errors; otherwise they are
        ignored.

    Raises:
      ValueError: the schema is invalid or unsupported, or no text fits it.
    """
    text = inference_json_schema.prepare(schema, strict)
    grammar = self._library.LLMatcher.grammar_from_json_schema(text)
    return self._constraint(grammar, 'the JSON schema')

  def json_object(self) -> Constraint:
    """Allows any JSON object."""
    return self.json_schema({'type': 'object'})

  def regex(self, text: str) -> Constraint:
    """Compiles a regular expression (Rust syntax), which must match all text.

    Raises:
      ValueError: it is invalid or too long.
    """
    if len(text) > self._limits.regex:
      raise ValueError(
        f'the regular expression has {len(text):,} characters, expected at '
        f'most {self._limits.regex:,}; make it shorter'
      )
    grammar = self._library.LLMatcher.grammar_from_regex(text)
    return self._constraint(grammar, 'the regular expression')

  def grammar(self, text: str) -> Constraint:
    """Compiles a grammar in llguidance's dialect of Lark.

    The white space of its %json schemas is bounded.

    Raises:
      ValueError: it is invalid or too long.
    """
    grammar = self._library.LLMatcher.grammar_from_lark(
      lark.bound_white_space(text)
    )
    return self._constraint(grammar, 'the grammar')

  def choice(self, options: Sequence[str]) -> Constraint:
    """Allows one of several texts.

    Raises:
      ValueError: there are no or too many options, or an option is invalid.
    """
    if isinstance(options, str) or not len(options):
      raise ValueError('a choice is a list of texts; expected at least one')
    if len(options) > self._limits.options:
      raise ValueError(
        f'the choice has {len(options):,} options, expected at most '
        f'{self._limits.options:,}; leave some out'
      )
    invalid = [
      option for option in options if not isinstance(option, str) or not option
    ]
    if invalid:
      raise ValueError(
        'the options of a choice are texts that are not empty, got '
        f'{invalid[0]!r}'
      )
    text = 'start: ' + ' | '.join(lark.literal(option) for option in options)
    grammar = self._library.LLMatcher.grammar_from_lark(text)
    return self._constraint(grammar, 'the choice')

  def tools(
    self,
    tools: Sequence[ToolSpec],
    choice: ToolChoice,
    parallel: bool,
    call_format: CallFormat,
  ) -> Constraint:
    """Constrains tool calls; see `tool_grammar.build_grammar`.

    Raises:
      ValueError: the parameters of a strict tool cannot be enforced.
    """
    text = tool_grammar.build_grammar(tools, choice, parallel, call_format)
    grammar = self._library.LLMatcher.grammar_from_lark(text)
    return self._constraint(grammar, 'the tools')

  def _constraint(self, grammar: str, label: str) -> GrammarConstraint:
    # Bounds the threads that wait for grammars, so that others stay free.
    if not self._waiting_slots.acquire(blocking=False):
      raise EngineFull(
        f'{self._limits.processes} requests wait for the compilation of their '
        'constraints, the maximum; try again later',
        self._limits.process.compile_seconds,
      )
    try:
      process = self._process(grammar, label)
    finally:
      self._waiting_slots.release()
    return GrammarConstraint(
      process.matcher(), self._tokens, lambda: self._forget(grammar, process)
    )

  def _process(self, grammar: str, label: str) -> GrammarProcess:
    """Returns a grammar's process, from the cache or compiled."""
    with self._lock:
      future, is_new = self._cache.get(grammar), False
      if future is None:
        future, is_new = Future(), True
        self._cache[grammar] = future
      self._cache.move_to_end(grammar)
      while len(self._cache) > self._limits.cached or (
        is_new and self._pool.full() and len(self._cache) > 1
      ):
        # Running answers keep the process of an evicted grammar.
        self._cache.popitem(last=False)
    if is_new:
      try:
        future.set_result(self._compile(grammar, label))
      except BaseException as error:
        self._forget(grammar)
        future.set_exception(error)
    return future.result()

  def _compile(self, grammar: str, label: str) -> GrammarProcess:
    process = self._pool.start_process()
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
    """Drops a grammar from the cache; `process` must be its, if given."""
    with self._lock:
      future = self._cache.get(grammar)
      if future and (process is None or _result(future) is process):
        del self._cache[grammar]


def _result(future: Future) -> GrammarProcess | None:
  return future.result() if future.done() else None


# The id of a token that adds no bytes at the start of a text.
_NO_TOKEN = -1


def _make_table(tokenizer: Tokenizer, vocab: int) -> TokenTable:
  """Makes the table of a tokenizer's token bytes."""
  first, later = TokenBytes(tokenizer).table(vocab)
  text = ''
  if isinstance(tokenizer, HuggingFaceTokenizer):
    text = tokenizer.tokenizer.backend_tokenizer.to_str()
  return TokenTable(text, later, first)


class _Tokens:
  """Maps the tokens of a vocabulary to the ids of llguidance.

  A token whose bytes differ at the start of a text ('▁a', which is 'a' there)
  is mapped to an id with those bytes, which may be an additional id above v.
  """

  def __init__(self, table: TokenTable, eos_token_ids: tuple[int, ...]):
    self.eos_token_ids, self.size = eos_token_ids, len(table.later)
    # Eos tokens have no bytes, even if their text is a newline.
    later, first = (
      [b'' if i in eos_token_ids else token for i, token in enumerate(texts)]
      for texts in (table.later, table.first)
    )
    self._table = dataclasses.replace(table, later=later, first=first)
    ids = {token: i for i, token in reversed(list(enumerate(later))) if token}
    self._ids_at_start, self._bytes = np.arange(self.size), list(later)
    for i, (first_bytes, later_bytes) in enumerate(
      zip(first, later, strict=True)
    ):
      if first_bytes and first_bytes not in ids:
        ids[first_bytes] = len(self._bytes)
        self._bytes.append(first_bytes)
      if first_bytes != later_bytes:
        self._ids_at_start[i] = ids.get(first_bytes, _NO_TOKEN)
    self._first_equals_later = first == later
    # The id of text that the vocabulary cannot represent.
    self._bytes.append(b'')
    self.usable = np.array([bool(x) for x in later])
    self.usable[list(eos_token_ids)] = True

  def vocabulary(self) -> bytes:
    """The message for the template process."""
    return pack_vocabulary(
      self._table.tokenizer, self.size, self._bytes, self.eos_token_ids
    )

  def unpack_mask(self, packed: bytes) -> np.ndarray:
    """Unpacks llguidance's bit mask to bool [v + additional ids]."""
    bits = np.frombuffer(packed, np.uint8)
    count = len(self._bytes)
    return np.unpackbits(bits, count=count, bitorder='little').view(bool)

  def id_at_start(self, token: int) -> int:
    """The id of a token's bytes at the start of a text, or _NO_TOKEN."""
    return int(self._ids_at_start[token])

  def mask_at_start(self, allowed: np.ndarray, matcher: Matcher) -> np.ndarray:
    """The mask of the first token, bool [v]."""
    if self._first_equals_later:
      return allowed[: self.size] & self.usable
    mask = allowed[self._ids_at_start] & (self._ids_at_start >= 0)
    # A leading space that is removed leaves the text unchanged.
    mask[self._ids_at_start == _NO_TOKEN] = (
      allowed[: self.size] & self.usable
    ).any()
    # If the text is forced, llguidance allows only the token that continues a
    # text, not the one that starts it.
    forced = matcher.forced()
    ids = self._table.encode_as_tokenizer(forced.decode(errors='ignore'))
    if forced and ids and ids[0] < self.size:
      first = self._table.first[ids[0]]
      mask[ids[0]] |= bool(first) and forced.startswith(first)
    return mask & self.usable


def _reason(message: str) -> str:
  """Shortens an error message of llguidance to a line."""
  if 'oneOf constraints are not supported' in message:
    return (
      "'oneOf' is supported only if its options differ by type or by a "
      "constant: use 'anyOf'"
    )
  if message.startswith('panic'):
    return 'the compiler failed, for example because of an unknown token'
  lines = [line.strip() for line in message.splitlines()]
  lines = [line for line in lines if line and '<non-verbose' not in line]
  error = next((x for x in lines if x.startswith('error: ')), '')
  return (error.removeprefix('error: ') or ''.join(lines[:1]))[:200]
