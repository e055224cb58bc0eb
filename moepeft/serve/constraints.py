# SPDX-License-Identifier: Apache-2.0
"""What an answer may be, as masks over the vocabulary: JSON schemas, regular
expressions, grammars, choices and calls of tools, by `llguidance`.

A mask of 49,152 tokens (SmolLM2's) takes 0.08 ms of processor time in the
mean, 0.6 ms at most in 99 of 100 cases, over thirty schemas and random
answers; a schema takes 4 ms to compile, once. What llguidance bounds at the
worst, a pattern made to grow, holds a mask up for less than a second and ends
the answer. Letter: v the model's vocabulary.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moepeft.data.vocabulary import Vocabulary
from moepeft.serve import call_grammar, json_schemas, lark
from moepeft.serve.protocol import Constraint
from moepeft.serve.token_bytes import Pieces, pieces
from moepeft.serve.tools import Choice, Style, Tool


@dataclasses.dataclass(frozen=True)
class Limits:
  """What compiling and following a grammar may cost.

  Attributes:
    kept: compiled grammars, those used last.
    regex: characters of a regular expression at most.
    options: of a choice, at most.
    states: of a grammar's lexer at most; about 2 kB each.
    fuel: expressions that a grammar's lexer begins with, at most; a hundred
      thousand are about 0.2 s.
  """

  kept: int = 32
  regex: int = 10_000
  options: int = 10_000
  states: int = 50_000
  fuel: int = 100_000


class Following:
  """A `Constraint`: the state of one answer in a grammar.

  The text is that of the answer's ids by themselves; where the tokenizer takes
  a blank from a text's beginning, the first token may have one.
  """

  def __init__(self, matcher: Any, tokens: '_Tokens', spoil: Callable):
    self._matcher, self._tokens, self._spoil = matcher, tokens, spoil
    self._begun = False

  def mask(self) -> np.ndarray:
    """bool [v]; where the text may end, the ends are True.

    Raises:
      ValueError: the grammar has grown too complex, or no token of the
        vocabulary goes on.
    """
    whole = self._tokens.bits(self._matcher.compute_bitmask())
    if self._begun:
      found = whole[: self._tokens.size] & self._tokens.usable
    else:
      found = self._tokens.beginning(whole, self._matcher)
    if self._matcher.is_error() or not found.any():
      self._fail('no token of the vocabulary goes on from here')
    return found

  def accept(self, token: int) -> bool:
    """Goes on by a token; whether the text must end.

    Raises:
      ValueError: the mask does not allow it.
    """
    if token in self._tokens.ends and self._matcher.is_accepting():
      return True
    inner = token if self._begun else self._tokens.inner(token)
    self._begun = True
    if inner != _NOTHING and not self._matcher.consume_token(inner):
      self._fail(f'token {token} is not allowed here')
    return self._matcher.is_stopped()

  def _fail(self, otherwise: str) -> None:
    self._spoil()
    reason = _reason(self._matcher.get_error())
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
    words: Vocabulary,
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
    self._tokens = _Tokens(llguidance, pieces(words, vocab), tuple(ends))
    self._kept: collections.OrderedDict[str, Any] = collections.OrderedDict()
    self._lock = threading.Lock()

  def json_schema(self, schema: Any, strict: bool = True) -> Constraint:
    """JSON that fits a schema; see `json_schemas.prepared`.

    Args:
      strict: whether keywords that cannot be kept are an error; else they are
        left out.

    Raises:
      ValueError: the schema cannot be kept, or no text fits it.
    """
    text = json_schemas.prepared(schema, strict)
    grammar = self._library.LLMatcher.grammar_from_json_schema(text)
    return self._following(grammar, 'the JSON schema')

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
    return self._following(grammar, 'the regular expression')

  def grammar(self, text: str) -> Constraint:
    """A text of a grammar in llguidance's kind of Lark.

    White space in its %json is bounded as elsewhere; else it is the grammar's.

    Raises:
      ValueError: it is none, or too long.
    """
    grammar = self._library.LLMatcher.grammar_from_lark(lark.bounded(text))
    return self._following(grammar, 'the grammar')

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
    wrong = [one for one in options if not isinstance(one, str) or not one]
    if wrong:
      raise ValueError(
        'the options of a choice are texts that are not empty, got '
        f'{wrong[0]!r}'
      )
    text = 'start: ' + ' | '.join(lark.literal(one) for one in options)
    grammar = self._library.LLMatcher.grammar_from_lark(text)
    return self._following(grammar, 'the choice')

  def tools(
    self, tools: Sequence[Tool], choice: Choice, parallel: bool, style: Style
  ) -> Constraint:
    """Calls of tools in a style's form; see `call_grammar.text`.

    Raises:
      ValueError: the parameters of a strict tool cannot be kept.
    """
    text = call_grammar.text(tools, choice, parallel, style)
    grammar = self._library.LLMatcher.grammar_from_lark(text)
    return self._following(grammar, 'the tools')

  def _following(self, grammar: str, what: str) -> Following:
    with self._lock:
      matcher = self._kept.pop(grammar, None)
      if matcher is None:
        matcher = self._compiled(grammar, what)
      self._kept[grammar] = matcher
      while len(self._kept) > self._limits.kept:
        self._kept.popitem(last=False)
      own = matcher.deep_copy()
    return Following(own, self._tokens, lambda: self._forget(grammar, matcher))

  def _compiled(self, grammar: str, what: str) -> Any:
    limits = self._library.LLParserLimits(
      max_lexer_states=self._limits.states,
      initial_lexer_fuel=self._limits.fuel,
      verbose_errors=False,
    )
    tokenizer = self._tokens.tokenizer
    made = self._library.LLMatcher(
      tokenizer, grammar, log_level=0, limits=limits
    )
    if made.is_error():
      raise ValueError(
        f'{what} cannot be followed: {_reason(made.get_error())}; change it'
      )
    try:
      Following(made.deep_copy(), self._tokens, lambda: None).mask()
    except ValueError:
      raise ValueError(
        f'{what} allows no text that the vocabulary can write; change it'
      ) from None
    return made

  def _forget(self, grammar: str, matcher: Any) -> None:
    """Its lexer, which all answers share, may have come to a limit."""
    with self._lock:
      if self._kept.get(grammar) is matcher:
        del self._kept[grammar]


# In place of an id: a token that adds nothing.
_NOTHING = -1


class _Tokens:
  """A vocabulary as llguidance reads it.

  Tokens that are others at a text's beginning ('▁a', which is 'a' there) are
  found by an id of the same bytes, if need be one above v.
  """

  # What llguidance asks a tokenizer for.
  is_tokenizer_wrapper = True
  bos_token_id = None

  def __init__(self, library: Any, found: Pieces, ends: tuple[int, ...]):
    self.ends, self.size, self.eos_token_id = ends, len(found.later), ends[0]
    # An end is one wherever it stands, though it be a line's.
    later, first = (
      [b'' if i in ends else piece for i, piece in enumerate(some)]
      for some in (found.later, found.first)
    )
    self._found = dataclasses.replace(found, later=later, first=first)
    ids = {piece: i for i, piece in reversed(list(enumerate(later))) if piece}
    self._inner, self.tokens = np.arange(self.size), list(later)
    for i, (now, then) in enumerate(zip(first, later, strict=True)):
      if now and now not in ids:
        ids[now] = len(self.tokens)
        self.tokens.append(now)
      if now != then:
        self._inner[i] = ids.get(now, _NOTHING)
    self._alike = first == later
    # What a text becomes that the vocabulary cannot write.
    self._never = len(self.tokens)
    self.tokens.append(b'')
    self.special_token_ids = [i for i, x in enumerate(self.tokens) if not x]
    self.usable = np.array([bool(x) for x in later])
    self.usable[list(ends)] = True
    self.tokenizer = library.LLTokenizer(self, eos_token=list(ends))

  def __call__(self, text: str) -> list[int]:
    return self._found.encode(text) or [self._never] * bool(text)

  def bits(self, packed: bytes) -> np.ndarray:
    """bool [v and more], of llguidance's one bit a token."""
    bits = np.frombuffer(packed, np.uint8)
    count = len(self.tokens)
    return np.unpackbits(bits, count=count, bitorder='little').view(bool)

  def inner(self, token: int) -> int:
    """The id of the bytes that a token is at the beginning, or _NOTHING."""
    return int(self._inner[token])

  def beginning(self, whole: np.ndarray, matcher: Any) -> np.ndarray:
    """bool [v], what may come first."""
    if self._alike:
      return whole[: self.size] & self.usable
    found = whole[self._inner] & (self._inner >= 0)
    # A blank alone leaves the text as it is.
    found[self._inner == _NOTHING] = (whole[: self.size] & self.usable).any()
    # Where only one text is possible, llguidance allows the one token with
    # which it would go on, not the one with which it begins.
    forced = matcher.compute_ff_bytes()
    ids = self._found.spell(forced.decode(errors='ignore'))
    if forced and ids and ids[0] < self.size:
      own = self._found.first[ids[0]]
      found[ids[0]] |= bool(own) and forced.startswith(own)
    return found & self.usable


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
