# SPDX-License-Identifier: Apache-2.0
"""Parses an answer into content and tool calls while it is generated."""

import dataclasses
import re
import secrets
from collections.abc import Callable, Collection

from moepeft.inference.tools.json_parser import CallsParser, MalformedCall
from moepeft.inference.tools.tools import Style


@dataclasses.dataclass(frozen=True)
class Content:
  """New content."""

  text: str


@dataclasses.dataclass(frozen=True)
class CallStart:
  """The start of a call; indices begin at 0."""

  index: int
  id: str
  name: str


@dataclasses.dataclass(frozen=True)
class Arguments:
  """The next part of a call's arguments, the text of a JSON object."""

  index: int
  text: str


Event = Content | CallStart | Arguments

_JSON_START = re.compile(r'[{\[]')


def random_id() -> str:
  return f'call_{secrets.token_hex(12)}'


class Parser:
  """A parser of an answer; its events do not depend on how the text is split.

  White space beside a call is dropped. A text that looks like a call but is
  none (not JSON, without a name, or with an unknown name if the style has no
  opening marker) becomes content, and is withheld until that is known. An
  answer that ends inside a call becomes content from there on. If calls are
  constrained, the events of the call are emitted already, and the rest is
  dropped.

  Attributes:
    calls: the number of calls.
  """

  def __init__(
    self,
    style: Style,
    names: Collection[str] = (),
    constrained: bool = False,
    make_id: Callable[[], str] = random_id,
    calls_only: bool = False,
  ):
    """
    Args:
      names: the names of the tools.
      constrained: whether a constraint guarantees valid calls, so that
        arguments are emitted while they are generated; otherwise a call is
        emitted at its end.
      make_id: makes the id of a call.
      calls_only: whether the constraint allows nothing but calls.
    """
    self.calls = 0
    self._style, self._constrained, self._make_id = style, constrained, make_id
    self._calls_only = calls_only
    # After an opening marker, a call with an unknown name is still a call.
    self._names = () if style.opening else names
    self._text, self._events, self._state = '', [], self._read_content
    # Whether the last event was a call, and whether there was content.
    self._after_call, self._has_content = False, False
    self._reader, self._raw, self._opening_text = CallsParser(), '', ''
    # Whether the call is emitted in parts, and whether a part was emitted.
    self._streams, self._emitted = False, False

  def feed(self, text: str) -> list[Event]:
    """Returns the new events."""
    self._text += text
    while self._state():
      pass
    return self._take_events()

  def finish(self) -> list[Event]:
    """Returns the events at the end of the answer."""
    discard = (
      self._calls_only or self._streams and self._state == self._read_call
    )
    if self._state == self._read_call and not (self._emitted or discard):
      self._emit_content(self._opening_text + self._raw)
    elif self._state == self._read_content and not discard:
      self._emit_content(self._text)
    self._text = ''
    return self._take_events()

  def _take_events(self) -> list[Event]:
    events, self._events = self._events, []
    return events

  def _read_content(self) -> bool:
    """Reads content up to a possible call; returns whether there is one."""
    if self._after_call:
      self._text = self._text.lstrip(self._separators)
    start, size = self._find_opening()
    content = self._text[:start].rstrip()
    blank = self._text[len(content) : start]
    self._emit_content(content)
    if not size:
      self._text = self._text[len(content) :]
      return False
    self._opening_text, self._raw = blank + self._text[start : start + size], ''
    self._text = self._text[start + size :]
    self._reader, self._emitted = CallsParser(self._names), False
    # Without an opening marker, the grammar constrains only a leading call.
    self._streams = self._constrained and (
      bool(self._style.opening) or not self._has_content
    )
    if not self._style.opening:
      self._opening_text, first = blank, self._opening_text[-1]
      self._text = first + self._text
    self._state = self._read_call
    return True

  @property
  def _separators(self) -> str:
    """The characters that may separate calls."""
    return ' \t\r\n' + self._style.separator.strip()

  def _find_opening(self) -> tuple[int, int]:
    """Returns the position of a possible call and the length of its opening.

    The length is 0 if the opening is absent or incomplete.
    """
    opening = self._style.opening
    if not opening:
      match = _JSON_START.search(self._text)
      return (match.start(), 1) if match else (len(self._text), 0)
    start = self._text.find(opening)
    if start >= 0:
      return start, len(opening)
    longest = min(len(opening) - 1, len(self._text))
    sizes = range(longest, 0, -1)
    partial = next((n for n in sizes if self._text.endswith(opening[:n])), 0)
    return len(self._text) - partial, 0

  def _read_call(self) -> bool:
    for position, char in enumerate(self._text):
      try:
        self._reader.feed(char)
      except MalformedCall:
        return self._reject_call(position)
      if self._streams:
        self._emit_call()
      if self._reader.done:
        self._emit_call()
        self._raw, self._text = '', self._text[position + 1 :]
        self._state = (
          self._read_closing if self._style.closing else self._read_content
        )
        return True
    self._raw += self._text
    self._text = ''
    return False

  def _emit_call(self) -> None:
    """Emits the parts that the reader has parsed."""
    self._emitted |= bool(self._reader.parts)
    for kind, text in self._reader.parts:
      if kind == 'name':
        self._events.append(CallStart(self.calls, self._make_id(), text))
        self.calls += 1
        self._after_call = True
      else:
        self._append(Arguments(self.calls - 1, text))
    self._reader.parts = []

  def _reject_call(self, position: int) -> bool:
    """Turns an invalid call into content, up to the invalid character.

    The content is not searched for calls again, so the time is linear.
    """
    self._state = self._read_content
    if not self._emitted:
      self._emit_content(self._opening_text + self._raw + self._text[:position])
    self._text = self._text[position:]
    return True

  def _read_closing(self) -> bool:
    text, closing = self._text.lstrip(), self._style.closing
    if len(text) < len(closing) and closing.startswith(text):
      return False
    self._text = text.removeprefix(closing)
    self._state = self._read_content
    return True

  def _emit_content(self, text: str) -> None:
    if self._after_call:
      text = text.lstrip()
    if text:
      self._after_call, self._has_content = False, True
      self._append(Content(text))

  def _append(self, event: Content | Arguments) -> None:
    """Appends an event, or extends the last one with its text."""
    last = self._events[-1] if self._events else None
    if type(last) is type(event) and getattr(last, 'index', 0) == getattr(
      event, 'index', 0
    ):
      text = last.text + event.text
      self._events[-1] = dataclasses.replace(last, text=text)
    else:
      self._events.append(event)
