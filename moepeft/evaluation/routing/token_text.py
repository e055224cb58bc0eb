# SPDX-License-Identifier: Apache-2.0
"""Tokens as text for the page, with those that are parts of characters.

Characters of several bytes are often several tokens: Chinese in a vocabulary of
bytes, emoji in a byte-level BPE. A token that begins or ends inside of a
character is a `Part`; all others are text.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.inference.detokenizer import Detokenizer
from moepeft.inference.token_bytes import TokenBytes

# Characters that are named for a token that is a part of them.
_MAX_CHARACTERS = 4


class Part(NamedTuple):
  """A token that begins or ends inside of a character.

  Attributes:
    text: the characters that begin in the token; '' for later bytes alone.
    characters: the characters that it has bytes of; '' if they are unknown.
    hex: its bytes, 'E4 B8'.
  """

  text: str
  characters: str
  hex: str


class TokenText:
  """The text of a tokenizer's tokens."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._bytes = TokenBytes(tokenizer)

  def of_token(self, i: int, characters: str = '') -> str | Part:
    """A token by itself, special tokens by name.

    Args:
      characters: those that it is a part of.
    """
    token = self._bytes[i]
    if _unfinished(token) == b'':
      return self._tokenizer.show([i])
    return Part('', characters, _hex(token))

  def characters(self, texts: Iterable[Sequence[int]]) -> dict[int, str]:
    """{token: characters of the texts that it is a part of, the first few}."""
    by_token: dict[int, dict[str, None]] = {}
    for ids in texts:
      for i, piece in zip(ids, self.of_text(ids), strict=True):
        if isinstance(piece, Part):
          whole = by_token.setdefault(int(i), {})
          whole |= dict.fromkeys(c for c in piece.characters if c.strip())
    return {
      i: ' '.join([*whole][:_MAX_CHARACTERS])
      + ' …' * (len(whole) > _MAX_CHARACTERS)
      for i, whole in by_token.items()
    }

  def of_text(self, ids: Sequence[int]) -> list[str | Part]:
    """The tokens of a text, special tokens by name."""
    detokenizer = Detokenizer(self._tokenizer.decode)
    result: list[str | Part] = []
    # Tokens since the last end of a character.
    group: list[bytes] = []
    for i in map(int, ids):
      text = detokenizer.feed([i])
      group.append(self._bytes[i])
      unfinished = _unfinished(b''.join(group))
      if unfinished is None and len(group) > 1:
        # The character before the token is never completed.
        *incomplete, last = group
        result += [Part('', '', _hex(token)) for token in incomplete]
        group, unfinished = [last], _unfinished(last)
      if unfinished:
        continue
      if unfinished is None:
        result.append(Part('', '', _hex(group[0])))
      elif len(group) > 1:
        result += _parts(group)
      else:
        # The decoder replaces incomplete characters before the token.
        text = text.lstrip('\ufffd')
        result.append(text or self._tokenizer.show([i]))
      group = []
    return result + [Part('', '', _hex(token)) for token in group]


def _unfinished(data: bytes) -> bytes | None:
  """The bytes of a character that the data ends inside of; None if not UTF-8.

  b'' is returned for whole characters.
  """
  decoder = codecs.getincrementaldecoder('utf-8')()
  try:
    decoder.decode(data)
  except UnicodeDecodeError:
    return None
  return decoder.getstate()[0]


def _parts(tokens: Sequence[bytes]) -> list[Part]:
  """The parts of tokens that are whole characters together."""
  begins, characters, place = [], b''.join(tokens).decode(), 0
  for character in characters:
    begins.append((place, place + len(character.encode()), character))
    place = begins[-1][1]
  result, start = [], 0
  for token in tokens:
    end = start + len(token)
    result.append(
      Part(
        ''.join(c for first, _, c in begins if start <= first < end),
        ''.join(c for first, last, c in begins if first < end and last > start),
        _hex(token),
      )
    )
    start = end
  return result


def _hex(token: bytes) -> str:
  return token.hex(' ').upper()
