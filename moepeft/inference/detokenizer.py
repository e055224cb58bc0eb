# SPDX-License-Identifier: Apache-2.0
"""Token ids to text while they come: whole characters, cut at stop strings.

What was given out is final: it is never taken back, and its sum is the text
of all ids decoded at once, up to the first stop string. Of bytes that are no
UTF-8 alone a decoder may say something else at once: one that decodes a run of
bytes together (byte fallback) breaks those before a stray one too.
"""

import re
from collections.abc import Callable, Mapping, Sequence

# What decoders put where bytes are no UTF-8, or not yet.
_BROKEN = '\ufffd'
_MARKER = re.compile('[\ud800-\udfff]')


class Detokenizer:
  """Ids to text, a few at a time, never half a character.

  Decoders join tokens (spaces, bytes of one character), so a token's text
  needs those before it: a window of the newest is decoded again and again.
  """

  def __init__(self, decode: Callable[[list[int]], str]):
    """
    Args:
      decode: ids to text, broken UTF-8 marked with U+FFFD.
    """
    self._decode = decode
    self._window: list[int] = []
    # How much of the window is given out: its tokens, then characters.
    self._tokens, self._emitted = 0, 0

  def feed(self, ids: Sequence[int]) -> str:
    """The text that is certain now, '' while a character is incomplete."""
    if not len(ids):
      return ''
    self._window += ids
    text = self._decode(self._window)
    whole = text.rstrip(_BROKEN)
    new = whole[self._emitted :]
    self._emitted += len(new)
    if whole == text:
      self._slide()
    return new

  def _slide(self) -> None:
    """Leaves the newest ids in the window: what the next are joined to."""
    newest = self._window[self._tokens :]
    text = self._decode(newest)
    # Decoders drop spaces at a text's beginning, so it must be past them.
    if text.strip():
      self._window, self._emitted = newest, len(text)
    self._tokens = len(self._window)

  def finish(self) -> str:
    """The bytes that never became a character, marked."""
    new = self._decode(self._window)[self._emitted :]
    self._emitted += len(new)
    return new


class StopStrings:
  """Text up to the first stop string, whichever way it comes in pieces.

  The first is the one that ends first, and of those the longest; what may be
  the beginning of one is held back.
  """

  def __init__(self, stops: Sequence[str]):
    """
    Raises:
      ValueError: a stop string is empty.
    """
    if '' in stops:
      raise ValueError('a stop string is empty; leave it out')
    self._stops, self._pending = tuple(stops), ''
    self.matched = False

  def feed(self, text: str) -> str:
    """The text that is before every stop string; '' once one is found."""
    if self.matched:
      return ''
    text = self._pending + text
    places = [(text.find(stop), stop) for stop in self._stops]
    ends = [(at + len(stop), at) for at, stop in places if at >= 0]
    if ends:
      self.matched, self._pending = True, ''
      return text[: min(ends)[1]]
    keep = max((_overlap(text, stop) for stop in self._stops), default=0)
    self._pending = text[len(text) - keep :]
    return text[: len(text) - keep]

  def finish(self) -> str:
    """The text that was withheld and became no stop string."""
    pending, self._pending = self._pending, ''
    return pending


class SpecialTokenMarkers:
  """Stop strings with special tokens, which have no text in an answer.

  A special token of a stop string is marked in the answer's text by a
  character that no text has, half of a surrogate pair, and the stop string is
  looked for in both forms: an answer may also spell such a token out.

  Attributes:
    stops: the stop strings, and those of the marked form.
    of: {id of a special token: its marker}.
  """

  def __init__(
    self, hidden: Callable[[str], Mapping[int, str]], stops: Sequence[str]
  ):
    """
    Args:
      hidden: {id: content} of a text's special tokens, see `vocabulary.hidden`.
    """
    tokens = hidden('\n'.join(stops)) if stops else {}
    # Surrogates are 2,048 characters; stop strings hold fewer tokens.
    pairs = zip(tokens.items(), map(chr, range(0xD800, 0xE000)), strict=False)
    self.of, by_content = {}, {}
    for (i, content), marker in pairs:
      self.of[i] = by_content[content] = marker
    self.stops = tuple(stops)
    if by_content:
      # As tokenizers do: of two that begin at one place, the longer.
      longest = sorted(by_content, key=len, reverse=True)
      pattern = re.compile('|'.join(map(re.escape, longest)))
      marked = (
        pattern.sub(lambda match: by_content[match[0]], stop) for stop in stops
      )
      self.stops = tuple(dict.fromkeys((*stops, *marked)))

  def removed(self, text: str) -> str:
    """The text without markers."""
    return _MARKER.sub('', text) if self.of else text


class TextStream:
  """The text of one answer while its ids come."""

  def __init__(
    self,
    decode: Callable[[list[int]], str],
    stops: Sequence[str] = (),
    hidden: Callable[[str], Mapping[int, str]] = lambda text: {},
  ):
    """
    Args:
      hidden: special tokens that stop strings may hold, see `Markers`.
    """
    self._detokenizer, self._markers = (
      Detokenizer(decode),
      SpecialTokenMarkers(hidden, stops),
    )
    self._stops = StopStrings(self._markers.stops)

  @property
  def stopped(self) -> bool:
    """Whether a stop string was met; what comes after it is no text."""
    return self._stops.matched

  def feed(self, ids: Sequence[int]) -> str:
    if not self._markers.of:
      return self._stops.feed(self._detokenizer.feed(ids))
    text = ''
    for i in ids:
      text += self._stops.feed(self._detokenizer.feed([i]))
      text += self._stops.feed(self._markers.of.get(i, ''))
    return self._markers.removed(text)

  def finish(self) -> str:
    """The rest, when no more ids come."""
    rest = self._stops.feed(self._detokenizer.finish())
    return self._markers.removed(rest + self._stops.finish())


def _overlap(text: str, stop: str) -> int:
  """The number of a text's last characters that begin a stop string."""
  most = min(len(text), len(stop) - 1)
  return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
