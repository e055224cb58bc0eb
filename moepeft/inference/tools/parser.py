# SPDX-License-Identifier: Apache-2.0
"""A streaming parser that separates an answer's content from its tool calls."""

import dataclasses
import re
import secrets
from collections.abc import Callable, Collection

from moepeft.inference.tools.json_parser import CallsParser, MalformedCall
from moepeft.inference.tools.tools import CallFormat


@dataclasses.dataclass(frozen=True)
class ContentDelta:
  """The next part of the content."""

  text: str


@dataclasses.dataclass(frozen=True)
class CallStart:
  """The start of a call; `index` counts the answer's calls from 0."""

  index: int
  id: str
  name: str


@dataclasses.dataclass(frozen=True)
class ArgumentsDelta:
  """The next part of the JSON text of a call's arguments."""

  index: int
  text: str


Event = ContentDelta | CallStart | ArgumentsDelta

_JSON_START = re.compile(r'[{\[]')


def random_id() -> str:
  return f'call_{secrets.token_hex(12)}'


class ToolCallParser:
  """A streaming parser of one answer.

  The events are the same, joined, for any split of the answer into chunks.
  White space around a call is dropped. Text that starts like a call is withheld
  until it is a call, or is invalid and becomes content: it is not JSON, has no
  name, or has an unknown name in a format without an opening marker. At the end
  of the answer an incomplete call becomes content, except a constrained call:
  its start has been emitted already, so the rest of it is dropped.

  Attributes:
    num_calls: the number of calls so far.
  """

  def __init__(
    self,
    call_format: CallFormat,
    names: Collection[str] = (),
    constrained: bool = False,
    make_id: Callable[[], str] = random_id,
    calls_only: bool = False,
  ):
    """
    Args:
      names: the names of the tools.
      constrained: whether a grammar guarantees that calls are valid. If so,
        the parts of a call are emitted as they arrive, otherwise at its end.
      make_id: makes the id of a call.
      calls_only: whether the grammar allows calls only.
    """
    self.num_calls = 0
    self._format, self._constrained, self._make_id = (
      call_format,
      constrained,
      make_id,
    )
    self._calls_only = calls_only
    # An opening marker shows that a call is meant, even if its name is unknown.
    self._names = () if call_format.opening else names
    self._text, self._events, self._state = '', [], self._read_content
    # Whether the last event was of a call, and whether any was content.
    self._after_call, self._has_content = False, False
    self._json_parser, self._call_text, self._opening_text = (
      CallsParser(),
      '',
      '',
    )
    # Of the current call: whether its parts are emitted as they arrive, and
    # whether its start has been emitted.
    self._stream_call, self._call_emitted = False, False

  def feed(self, text: str) -> list[Event]:
    """Parses the next chunk of the answer; returns the new events."""
    self._text += text
    while self._state():
      pass
    return self._take_events()

  def finish(self) -> list[Event]:
    """Returns the events at the end of the answer."""
    discard = (
      self._calls_only or self._stream_call and self._state == self._read_call
    )
    if self._state == self._read_call and not (self._call_emitted or discard):
      self._emit_content(self._opening_text + self._call_text)
    elif self._state == self._read_content and not discard:
      self._emit_content(self._text)
    self._text = ''
    return self._take_events()

  def _take_events(self) -> list[Event]:
    events, self._events = self._events, []
    return events

  def _read_content(self) -> bool:
    """Emits the content before a possible call; returns whether one starts."""
    if self._after_call:
      self._text = self._text.lstrip(self._separators)
    start, opening_length = self._find_opening()
    content = self._text[:start].rstrip()
    space = self._text[len(content) : start]
    self._emit_content(content)
    if not opening_length:
      self._text = self._text[len(content) :]
      return False
    end = start + opening_length
    self._opening_text, self._call_text = space + self._text[start:end], ''
    self._text = self._text[end:]
    self._json_parser, self._call_emitted = CallsParser(self._names), False
    # Without an opening marker, the grammar allows no call after content.
    self._stream_call = self._constrained and (
      bool(self._format.opening) or not self._has_content
    )
    if not self._format.opening:
      self._opening_text, first = space, self._opening_text[-1]
      self._text = first + self._text
    self._state = self._read_call
    return True

  @property
  def _separators(self) -> str:
    """The characters that may separate calls."""
    return ' \t\r\n' + self._format.separator.strip()

  def _find_opening(self) -> tuple[int, int]:
    """Returns where a call may start, and the length of its opening marker.

    A format without a marker has a brace or bracket instead. The length is 0 if
    the marker is absent, or incomplete at the end of the text.
    """
    opening = self._format.opening
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
        self._json_parser.feed(char)
      except MalformedCall:
        return self._reject_call(position)
      if self._stream_call:
        self._emit_call()
      if self._json_parser.done:
        self._emit_call()
        self._call_text, self._text = '', self._text[position + 1 :]
        self._state = (
          self._skip_closing if self._format.closing else self._read_content
        )
        return True
    self._call_text += self._text
    self._text = ''
    return False

  def _emit_call(self) -> None:
    """Emits the parts of the call that are parsed and not emitted yet."""
    self._call_emitted |= bool(self._json_parser.parts)
    for kind, text in self._json_parser.parts:
      if kind == 'name':
        self._events.append(CallStart(self.num_calls, self._make_id(), text))
        self.num_calls += 1
        self._after_call = True
      else:
        self._append(ArgumentsDelta(self.num_calls - 1, text))
    self._json_parser.parts = []

  def _reject_call(self, position: int) -> bool:
    """Turns an invalid call into content, up to the invalid character.

    That content is not searched for another call, so that time is linear.
    """
    self._state = self._read_content
    if not self._call_emitted:
      self._emit_content(
        self._opening_text + self._call_text + self._text[:position]
      )
    self._text = self._text[position:]
    return True

  def _skip_closing(self) -> bool:
    text, closing = self._text.lstrip(), self._format.closing
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
      self._append(ContentDelta(text))

  def _append(self, event: ContentDelta | ArgumentsDelta) -> None:
    """Appends an event, or extends the last one with its text."""
    last = self._events[-1] if self._events else None
    if type(last) is type(event) and getattr(last, 'index', 0) == getattr(
      event, 'index', 0
    ):
      text = last.text + event.text
      self._events[-1] = dataclasses.replace(last, text=text)
    else:
      self._events.append(event)
