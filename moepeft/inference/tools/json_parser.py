# SPDX-License-Identifier: Apache-2.0
"""Calls of tools written as JSON (RFC 8259), read letter by letter."""

import re
from collections.abc import Collection
from typing import Any

from moepeft.core import untrusted

DEPTH = 64
_BLANKS = ' \t\r\n'
_SCALAR = re.compile(
  r'true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?'
)
_ARGUMENTS = ('arguments', 'parameters')
# What a call may have beside, which says nothing more.
_BESIDE = ('id', 'type')
# What a call tells of itself: ('name', its name), ('arguments', more of them).
CallPart = tuple[str, str]


class MalformedCall(ValueError):
  """It is not JSON, or no call."""


class Json:
  """A JSON object or list.

  Attributes:
    open: the brackets around the next letter.
    state: what the letter is of: 'value', 'item' (or the list's end), 'first'
      (key, or the object's end), 'key', 'colon', 'after', 'string', 'escape',
      'hex' or 'scalar'.
    in_key: whether the string is a key.
  """

  def __init__(self):
    self.open, self.state, self.in_key = '', 'value', False
    self._scalar, self._hex = '', 0

  @property
  def done(self) -> bool:
    return not self.open and self.state == 'after'

  def feed(self, letter: str) -> None:
    """
    Raises:
      Malformed: no JSON goes on so.
    """
    if self.state == 'string':
      self._string(letter)
    elif self.state == 'escape':
      self._expect(letter in '"\\/bfnrtu')
      self.state, self._hex = 'hex' if letter == 'u' else 'string', 4
    elif self.state == 'hex':
      self._expect(letter in '0123456789abcdefABCDEF')
      self._hex -= 1
      self.state = 'hex' if self._hex else 'string'
    elif self.state == 'scalar' and (letter.isalnum() or letter in '+-.'):
      self._scalar += letter
    else:
      if self.state == 'scalar':
        self._expect(_SCALAR.fullmatch(self._scalar))
        self.state = 'after'
      if letter not in _BLANKS:
        self._sign(letter)

  def _string(self, letter: str) -> None:
    self._expect(letter >= ' ')
    if letter == '\\':
      self.state = 'escape'
    elif letter == '"':
      self.state = 'colon' if self.in_key else 'after'

  def _sign(self, letter: str) -> None:
    state = self.state
    if state == 'after':
      self._after(letter)
    elif state == 'colon':
      self._expect(letter == ':')
      self.state = 'value'
    elif letter == {'item': ']', 'first': '}'}.get(state):
      self._close()
    elif state in ('first', 'key'):
      self._expect(letter == '"')
      self.state, self.in_key = 'string', True
    else:
      self._value(letter)

  def _after(self, letter: str) -> None:
    inner = self.open[-1:]
    if letter == ',' and inner:
      self.state = 'key' if inner == '{' else 'value'
    else:
      self._expect((inner, letter) in (('{', '}'), ('[', ']')))
      self._close()

  def _value(self, letter: str) -> None:
    if letter in '{[':
      self._expect(len(self.open) < DEPTH)
      self.open += letter
      self.state = 'first' if letter == '{' else 'item'
    elif letter == '"':
      self.state, self.in_key = 'string', False
    else:
      self._expect(letter in '-0123456789tfn' and self.open)
      self.state, self._scalar = 'scalar', letter

  def _close(self) -> None:
    self.open, self.state = self.open[:-1], 'after'

  def _expect(self, right: Any) -> None:
    if not right:
      raise MalformedCall(f'no JSON goes on so where {self.state} is expected')


class Calls:
  """One call, {"name": ..., "arguments": {...}}, or a list of them.

  Attributes:
    said: what is new, in order; the reader takes it away. A name comes first,
      and each call has arguments.
  """

  def __init__(self, names: Collection[str] = ()):
    """
    Args:
      names: others are no calls; () for any.
    """
    self.parts: list[CallPart] = []
    self._names, self._json, self._count = names, Json(), 0
    self._base = 0
    self._begin()

  @property
  def done(self) -> bool:
    return self._json.done

  def _begin(self) -> None:
    self._name, self._arguments, self._has_arguments = '', '', False
    self._key, self._keys, self._target, self._raw = '', set(), '', ''

  def feed(self, letter: str) -> None:
    """
    Raises:
      Malformed: it is no call, or no JSON.
    """
    json_, before = self._json, self._json.state
    depth = len(json_.open)
    if not depth and letter not in _BLANKS + '{[':
      raise MalformedCall('a call is an object or a list')
    json_.feed(letter)
    if not depth:
      self._base = len(json_.open) + (letter == '[')
    elif depth < self._base:
      if letter not in _BLANKS + '{,]':
        raise MalformedCall('a list of calls has something else in it')
      if json_.done and not self._count:
        raise MalformedCall('the list has no calls')
    elif depth == self._base and not self._target:
      self._member(letter, before)
    else:
      self._value(letter, before, depth)
    if depth == self._base and len(json_.open) < depth:
      self._end()

  def _member(self, letter: str, before: str) -> None:
    """A letter of a key, or the first of its value."""
    if self._json.in_key and self._json.state in ('string', 'escape', 'hex'):
      self._key = '' if before in ('first', 'key') else self._key + letter
    elif before == 'value' and letter not in _BLANKS:
      self._target = self._named(self._key)
      self._raw = ''
      first = {'name': '"', 'arguments': '{"n'}.get(self._target, letter)
      if letter not in first:
        raise MalformedCall(f'{self._target} of a call is of the wrong kind')
      self._value(letter, before, self._base)

  def _named(self, key: str) -> str:
    targets = {'name': 'name'} | dict.fromkeys(_ARGUMENTS, 'arguments')
    target = targets.get(key, key)
    if target in self._keys or key not in (*targets, *_BESIDE):
      raise MalformedCall('a call has other keys')
    self._keys.add(target)
    return target

  def _value(self, letter: str, before: str, depth: int) -> None:
    """A letter of a member's value, or the one after a scalar's last."""
    json_ = self._json
    if before == 'scalar' and depth == self._base and json_.state != before:
      self._member_end()
      return
    self._raw += letter
    if self._target == 'arguments' and self._raw[0] == '{':
      self._emit_arguments(letter)
    if len(json_.open) == self._base and json_.state == 'after':
      self._member_end()

  def _member_end(self) -> None:
    target, self._target, raw = self._target, '', self._raw
    if target == 'name':
      self._call(_parsed(raw))
    elif target == 'arguments' and raw[0] == '"':
      self._emit_arguments(_object(_parsed(raw)))
    elif target == 'arguments' and raw[0] == 'n':
      self._emit_arguments('{}')

  def _call(self, name: str) -> None:
    if not name or (self._names and name not in self._names):
      raise MalformedCall(f'{name!r} is no tool')
    self._name = name
    self.parts.append(('name', name))
    if self._arguments:
      self.parts.append(('arguments', self._arguments))

  def _emit_arguments(self, text: str) -> None:
    self._has_arguments = True
    if self._name:
      self.parts.append(('arguments', text))
    else:
      self._arguments += text

  def _end(self) -> None:
    """The call's last brace."""
    if not self._name:
      raise MalformedCall('a call has no name')
    if not self._has_arguments:
      self.parts.append(('arguments', '{}'))
    self._count += 1
    self._begin()


def _object(text: str) -> str:
  """The same, where it is a JSON object written as a text."""
  if not isinstance(_parsed(text), dict):
    raise MalformedCall('the arguments are a text that is no JSON object')
  return text


def _parsed(text: str) -> Any:
  """
  Raises:
    Malformed: it is not JSON, or its text cannot be sent to a client.
  """
  try:
    return untrusted.parse_json(text)
  except untrusted.Malformed as error:
    raise MalformedCall(str(error)) from None
