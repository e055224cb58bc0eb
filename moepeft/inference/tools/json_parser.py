# SPDX-License-Identifier: Apache-2.0
"""Parses tool calls in JSON (RFC 8259), character by character."""

import re
from collections.abc import Collection
from typing import Any

from moepeft.core import untrusted

MAX_DEPTH = 64
_WHITESPACE = ' \t\r\n'
_SCALAR = re.compile(
  r'true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?'
)
_ARGUMENTS = ('arguments', 'parameters')
# Other keys that a call may have; their values are ignored.
_IGNORED_KEYS = ('id', 'type')
# ('name', the name) or ('arguments', the next part of the arguments).
CallPart = tuple[str, str]


class MalformedCall(ValueError):
  """The text is not JSON, or not a call."""


class JsonParser:
  """A parser of one JSON object or list.

  Attributes:
    open_brackets: the brackets around the next character.
    state: the expected token: 'value', 'item' (or the list's end), 'first' (a
      key, or the object's end), 'key', 'colon', 'after' (a comma or an end), or
      the token that is being read: 'string', 'escape', 'hex' or 'scalar'.
    in_key: whether the string is a key.
  """

  def __init__(self):
    self.open_brackets, self.state, self.in_key = '', 'value', False
    self._scalar, self._hex = '', 0

  @property
  def done(self) -> bool:
    return not self.open_brackets and self.state == 'after'

  def feed(self, char: str) -> None:
    """Reads a character.

    Raises:
      MalformedCall: the text is not JSON.
    """
    if self.state == 'string':
      self._string(char)
    elif self.state == 'escape':
      self._expect(char in '"\\/bfnrtu')
      self.state, self._hex = 'hex' if char == 'u' else 'string', 4
    elif self.state == 'hex':
      self._expect(char in '0123456789abcdefABCDEF')
      self._hex -= 1
      self.state = 'hex' if self._hex else 'string'
    elif self.state == 'scalar' and (char.isalnum() or char in '+-.'):
      self._scalar += char
    else:
      if self.state == 'scalar':
        self._expect(_SCALAR.fullmatch(self._scalar))
        self.state = 'after'
      if char not in _WHITESPACE:
        self._structural(char)

  def _string(self, char: str) -> None:
    self._expect(char >= ' ')
    if char == '\\':
      self.state = 'escape'
    elif char == '"':
      self.state = 'colon' if self.in_key else 'after'

  def _structural(self, char: str) -> None:
    state = self.state
    if state == 'after':
      self._after(char)
    elif state == 'colon':
      self._expect(char == ':')
      self.state = 'value'
    elif char == {'item': ']', 'first': '}'}.get(state):
      self._close()
    elif state in ('first', 'key'):
      self._expect(char == '"')
      self.state, self.in_key = 'string', True
    else:
      self._value(char)

  def _after(self, char: str) -> None:
    innermost = self.open_brackets[-1:]
    if char == ',' and innermost:
      self.state = 'key' if innermost == '{' else 'value'
    else:
      self._expect((innermost, char) in (('{', '}'), ('[', ']')))
      self._close()

  def _value(self, char: str) -> None:
    if char in '{[':
      self._expect(len(self.open_brackets) < MAX_DEPTH)
      self.open_brackets += char
      self.state = 'first' if char == '{' else 'item'
    elif char == '"':
      self.state, self.in_key = 'string', False
    else:
      self._expect(char in '-0123456789tfn' and self.open_brackets)
      self.state, self._scalar = 'scalar', char

  def _close(self) -> None:
    self.open_brackets, self.state = self.open_brackets[:-1], 'after'

  def _expect(self, valid: Any) -> None:
    if not valid:
      raise MalformedCall(f'the text is not JSON: expected {self.state}')


class CallsParser:
  """A parser of a call, {"name": ..., "arguments": {...}}, or a list of calls.

  Attributes:
    parts: the new parts of calls, which the caller removes. Each call has a
      name, followed by its arguments.
  """

  def __init__(self, names: Collection[str] = ()):
    """
    Args:
      names: the names of the tools; () allows any name.
    """
    self.parts: list[CallPart] = []
    self._names, self._json, self._count = names, JsonParser(), 0
    self._call_depth = 0
    self._start_call()

  @property
  def done(self) -> bool:
    return self._json.done

  def _start_call(self) -> None:
    self._name, self._arguments, self._has_arguments = '', '', False
    self._key, self._keys, self._target, self._raw = '', set(), '', ''

  def feed(self, char: str) -> None:
    """Reads a character.

    Raises:
      MalformedCall: the text is not JSON, or not a call.
    """
    json_, last_state = self._json, self._json.state
    depth = len(json_.open_brackets)
    if not depth and char not in _WHITESPACE + '{[':
      raise MalformedCall('a call is an object or a list')
    json_.feed(char)
    if not depth:
      self._call_depth = len(json_.open_brackets) + (char == '[')
    elif depth < self._call_depth:
      if char not in _WHITESPACE + '{,]':
        raise MalformedCall('the list has an item that is not a call')
      if json_.done and not self._count:
        raise MalformedCall('the list has no calls')
    elif depth == self._call_depth and not self._target:
      self._member(char, last_state)
    else:
      self._value(char, last_state, depth)
    if depth == self._call_depth and len(json_.open_brackets) < depth:
      self._finish_call()

  def _member(self, char: str, last_state: str) -> None:
    """Reads a character of a key, or the first one of its value."""
    if self._json.in_key and self._json.state in ('string', 'escape', 'hex'):
      self._key = '' if last_state in ('first', 'key') else self._key + char
    elif last_state == 'value' and char not in _WHITESPACE:
      self._target = self._read_key(self._key)
      self._raw = ''
      first = {'name': '"', 'arguments': '{"n'}.get(self._target, char)
      if char not in first:
        raise MalformedCall(f'{self._target} of a call has the wrong type')
      self._value(char, last_state, self._call_depth)

  def _read_key(self, key: str) -> str:
    targets = {'name': 'name'} | dict.fromkeys(_ARGUMENTS, 'arguments')
    target = targets.get(key, key)
    if target in self._keys or key not in (*targets, *_IGNORED_KEYS):
      raise MalformedCall('a call has an unknown or repeated key')
    self._keys.add(target)
    return target

  def _value(self, char: str, last_state: str, depth: int) -> None:
    """Reads a character of a value, or the one after a scalar."""
    json_ = self._json
    if (
      last_state == 'scalar'
      and depth == self._call_depth
      and json_.state != last_state
    ):
      self._finish_member()
      return
    self._raw += char
    if self._target == 'arguments' and self._raw[0] == '{':
      self._emit_arguments(char)
    if len(json_.open_brackets) == self._call_depth and json_.state == 'after':
      self._finish_member()

  def _finish_member(self) -> None:
    target, self._target, raw = self._target, '', self._raw
    if target == 'name':
      self._read_name(_parse(raw))
    elif target == 'arguments' and raw[0] == '"':
      self._emit_arguments(_check_object(_parse(raw)))
    elif target == 'arguments' and raw[0] == 'n':
      self._emit_arguments('{}')

  def _read_name(self, name: str) -> None:
    if not name or (self._names and name not in self._names):
      raise MalformedCall(f'{name!r} is not a tool')
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

  def _finish_call(self) -> None:
    """Handles the closing brace of a call."""
    if not self._name:
      raise MalformedCall('a call has no name')
    if not self._has_arguments:
      self.parts.append(('arguments', '{}'))
    self._count += 1
    self._start_call()


def _check_object(text: str) -> str:
  """Returns a text after checking that it is a JSON object."""
  if not isinstance(_parse(text), dict):
    raise MalformedCall('the arguments are a text that is not a JSON object')
  return text


def _parse(text: str) -> Any:
  """Parses JSON.

  Raises:
    MalformedCall: it is not JSON, or its text is not valid Unicode.
  """
  try:
    return untrusted.parse_json(text)
  except untrusted.Malformed as error:
    raise MalformedCall(str(error)) from None
