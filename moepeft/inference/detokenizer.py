# SPDX-License-Identifier: Apache-2.0
"""Incremental detokenization: token ids to text, up to a stop string.

The concatenated output is the text of all ids decoded at once, up to the first
stop string. It may differ only for bytes that are not UTF-8: a decoder with
byte fallback replaces a whole run of bytes if one of them is invalid.
"""

import re
from collections.abc import Callable, Mapping, Sequence

# The character that decoders write for bytes that are not UTF-8, or incomplete.
_REPLACEMENT = '\ufffd'
_MARKER = re.compile('[\ud800-\udfff]')


class Detokenizer:
  """Decodes ids incrementally, without incomplete characters.

  A token's text depends on the tokens before it (spaces, bytes of a character),
  so a window of the newest tokens is decoded again for each new one.
  """

  def __init__(self, decode: Callable[[list[int]], str]):
    """
    Args:
      decode: decodes ids to text, with U+FFFD for invalid UTF-8.
    """
    self._decode = decode
    self._window: list[int] = []
    # The numbers of tokens and of characters of the window that were emitted.
    self._tokens, self._emitted = 0, 0

  def feed(self, ids: Sequence[int]) -> str:
    """Returns the new text; '' while a character is incomplete."""
    if not len(ids):
      return ''
    self._window += ids
    text = self._decode(self._window)
    complete = text.rstrip(_REPLACEMENT)
    new = complete[self._emitted :]
    self._emitted += len(new)
    if complete == text:
      self._slide()
    return new

  def _slide(self) -> None:
    """Shortens the window to the newest ids."""
    newest = self._window[self._tokens :]
    text = self._decode(newest)
    # Decoders drop leading spaces, so the window must not begin with them.
    if text.strip():
      self._window, self._emitted = newest, len(text)
    self._tokens = len(self._window)

  def finish(self) -> str:
    """Returns the remaining text, with U+FFFD for incomplete characters."""
    new = self._decode(self._window)[self._emitted :]
    self._emitted += len(new)
    return new


class StopStrings:
  """Passes text on up to the first stop string.

  The first stop string is the one that ends first, and of those the longest.
  Text that may be the beginning of a stop string is withheld.
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
    """Returns the new text before a stop string; '' after one was found."""
    if self.matched:
      return ''
    text = self._pending + text
    matches = [(text.find(stop), stop) for stop in self._stops]
    spans = [
      (start + len(stop), start) for start, stop in matches if start >= 0
    ]
    if spans:
      self.matched, self._pending = True, ''
      return text[: min(spans)[1]]
    withheld = max((_overlap(text, stop) for stop in self._stops), default=0)
    self._pending = text[len(text) - withheld :]
    return text[: len(text) - withheld]

  def finish(self) -> str:
    """Returns the withheld text, which is not part of a stop string."""
    pending, self._pending = self._pending, ''
    return pending


class SpecialTokenMarkers:
  """Markers for special tokens in stop strings, which are not decoded to text.

  A special token of a stop string is represented in the answer's text by a
  marker, half of a surrogate pair, which no text contains. The stop string is
  searched with markers and as it is, since an answer may also spell it out.

  Attributes:
    stops: the stop strings, and their versions with markers.
    by_token: {id of a special token: its marker}.
  """

  def __init__(
    self,
    special_tokens: Callable[[str], Mapping[int, str]],
    stops: Sequence[str],
  ):
    """
    Args:
      special_tokens: returns {id: content} of the special tokens in a text; see
        `skipped_special_tokens`.
    """
    tokens = special_tokens('\n'.join(stops)) if stops else {}
    # There are 2,048 surrogates, more than the special tokens in stop strings.
    pairs = zip(tokens.items(), map(chr, range(0xD800, 0xE000)), strict=False)
    self.by_token, by_content = {}, {}
    for (i, content), marker in pairs:
      self.by_token[i] = by_content[content] = marker
    self.stops = tuple(stops)
    if by_content:
      # As in tokenizers, the longer of two tokens at the same position wins.
      longest = sorted(by_content, key=len, reverse=True)
      pattern = re.compile('|'.join(map(re.escape, longest)))
      marked = (
        pattern.sub(lambda match: by_content[match[0]], stop) for stop in stops
      )
      self.stops = tuple(dict.fromkeys((*stops, *marked)))

  def remove(self, text: str) -> str:
    """Removes the markers from a text."""
    return _MARKER.sub('', text) if self.by_token else text


class TextStream:
  """The text of one answer while it is generated."""

  def __init__(
    self,
    decode: Callable[[list[int]], str],
    stops: Sequence[str] = (),
    special_tokens: Callable[[str], Mapping[int, str]] = lambda text: {},
  ):
    """
    Args:
      special_tokens: see `SpecialTokenMarkers`.
    """
    self._detokenizer = Detokenizer(decode)
    self._markers = SpecialTokenMarkers(special_tokens, stops)
    self._stops = StopStrings(self._markers.stops)

  @property
  def stopped(self) -> bool:
    """Whether a stop string was found; later text is dropped."""
    return self._stops.matched

  def feed(self, ids: Sequence[int]) -> str:
    if not self._markers.by_token:
      return self._stops.feed(self._detokenizer.feed(ids))
    text = ''
    for i in ids:
      text += self._stops.feed(self._detokenizer.feed([i]))
      text += self._stops.feed(self._markers.by_token.get(i, ''))
    return self._markers.remove(text)

  def finish(self) -> str:
    """Returns the remaining text."""
    text = self._stops.feed(self._detokenizer.finish())
    return self._markers.remove(text + self._stops.finish())


def _overlap(text: str, stop: str) -> int:
  """The number of last characters of a text that begin a stop string."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
