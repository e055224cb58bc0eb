# SPDX-License-Identifier: Apache-2.0
"""The text of an answer as content and calls of tools, while it comes."""

import dataclasses
import re
import secrets
from collections.abc import Callable, Collection

from moepeft.inference.tools.json_parser import Calls, MalformedCall
from moepeft.inference.tools.tools import Style


@dataclasses.dataclass(frozen=True)
class Content:
  """More of what is said to the user."""

  text: str


@dataclasses.dataclass(frozen=True)
class CallStart:
  """A call begins; calls are counted from 0."""

  index: int
  id: str
  name: str


@dataclasses.dataclass(frozen=True)
class Arguments:
  """More of a call's arguments, the text of a JSON object."""

  index: int
  text: str


Event = Content | CallStart | Arguments

_BEGINS = re.compile(r'[{\[]')


def new_id() -> str:
  return f'call_{secrets.token_hex(12)}'


class Parser:
  """Reads an answer; what it gives out is final, whichever way text comes.

  White space beside a call is left out. What looks like a call and is none
  (no JSON, no name, a name that is no tool where the style has no opening)
  is content, every letter of it; it is held back until that is known. An
  answer that ends inside of a call is content from there on, unless the calls
  are known to be well formed: then what came of it is out already, and a name
  that was cut off is nobody's.

  Attributes:
    calls: how many there were.
  """

  def __init__(
    self,
    style: Style,
    names: Collection[str] = (),
    sure: bool = False,
    ids: Callable[[], str] = new_id,
    forced: bool = False,
  ):
    """
    Args:
      names: of the tools.
      sure: whether a constraint keeps calls to their form, so that arguments
        are given out as they come; else each call comes at once.
      ids: makes the id of a call.
      forced: whether the constraint lets nothing but calls be written.
    """
    self.calls = 0
    self._style, self._sure, self._ids = style, sure, ids
    self._forced = forced
    # An opening says that a call is meant, so that an unknown name is the
    # caller's to complain of.
    self._names = () if style.opening else names
    self._text, self._out, self._state = '', [], self._free
    # Whether a call was the last thing, and whether there was content.
    self._after, self._spoken = False, False
    self._reader, self._raw, self._before = Calls(), '', ''
    # Whether this call is given out as it comes, and whether some of it is.
    self._streams, self._sent = False, False

  def feed(self, text: str) -> list[Event]:
    """The events that are certain by now."""
    self._text += text
    while self._state():
      pass
    return self._take_events()

  def finish(self) -> list[Event]:
    """The rest, when no more comes."""
    cut = self._forced or self._streams and self._state == self._inside
    if self._state == self._inside and not (self._sent or cut):
      self._emit_content(self._before + self._raw)
    elif self._state == self._free and not cut:
      self._emit_content(self._text)
    self._text = ''
    return self._take_events()

  def _take_events(self) -> list[Event]:
    out, self._out = self._out, []
    return out

  def _free(self) -> bool:
    """Content, until a call may begin; whether there is more to read."""
    if self._after:
      self._text = self._text.lstrip(self._gap)
    at, size = self._opening()
    content = self._text[:at].rstrip()
    blank = self._text[len(content) : at]
    self._emit_content(content)
    if not size:
      self._text = self._text[len(content) :]
      return False
    self._before, self._raw = blank + self._text[at : at + size], ''
    self._text = self._text[at + size :]
    self._reader, self._sent = Calls(self._names), False
    # Without an opening, only what the answer begins with is kept to a form.
    self._streams = self._sure and (
      bool(self._style.opening) or not self._spoken
    )
    if not self._style.opening:
      self._before, first = blank, self._before[-1]
      self._text = first + self._text
    self._state = self._inside
    return True

  @property
  def _gap(self) -> str:
    """The characters that may part calls."""
    return ' \t\r\n' + self._style.separator.strip()

  def _opening(self) -> tuple[int, int]:
    """The place where a call may begin, and the size of its opening; 0 if
    none is whole."""
    opening = self._style.opening
    if not opening:
      match = _BEGINS.search(self._text)
      return (match.start(), 1) if match else (len(self._text), 0)
    at = self._text.find(opening)
    if at >= 0:
      return at, len(opening)
    most = min(len(opening) - 1, len(self._text))
    sizes = range(most, 0, -1)
    part = next((n for n in sizes if self._text.endswith(opening[:n])), 0)
    return len(self._text) - part, 0

  def _inside(self) -> bool:
    for at, letter in enumerate(self._text):
      try:
        self._reader.feed(letter)
      except MalformedCall:
        return self._mistaken(at)
      if self._streams:
        self._emit_call()
      if self._reader.done:
        self._emit_call()
        self._raw, self._text = '', self._text[at + 1 :]
        self._state = self._closing if self._style.closing else self._free
        return True
    self._raw += self._text
    self._text = ''
    return False

  def _emit_call(self) -> None:
    """Gives out what the reader has found."""
    self._sent |= bool(self._reader.parts)
    for kind, text in self._reader.parts:
      if kind == 'name':
        self._out.append(CallStart(self.calls, self._ids(), text))
        self.calls += 1
        self._after = True
      else:
        self._add(Arguments(self.calls - 1, text))
    self._reader.parts = []

  def _mistaken(self, at: int) -> bool:
    """It is no call: content up to the letter that tells, which is read anew.

    What stands inside of it is not looked at again: reading takes time in
    proportion to the text.
    """
    self._state = self._free
    if not self._sent:
      self._emit_content(self._before + self._raw + self._text[:at])
    self._text = self._text[at:]
    return True

  def _closing(self) -> bool:
    text, closing = self._text.lstrip(), self._style.closing
    if len(text) < len(closing) and closing.startswith(text):
      return False
    self._text = text.removeprefix(closing)
    self._state = self._free
    return True

  def _emit_content(self, text: str) -> None:
    if self._after:
      text = text.lstrip()
    if text:
      self._after, self._spoken = False, True
      self._add(Content(text))

  def _add(self, event: Content | Arguments) -> None:
    """Puts an event to the last one where it goes on with it."""
    last = self._out[-1] if self._out else None
    if type(last) is type(event) and getattr(last, 'index', 0) == getattr(
      event, 'index', 0
    ):
      joined = last.text + event.text
      self._out[-1] = dataclasses.replace(last, text=joined)
    else:
      self._out.append(event)
