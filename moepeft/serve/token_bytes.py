# SPDX-License-Identifier: Apache-2.0
"""The bytes that each token adds to a text, of any vocabulary.

A grammar is over bytes: tokens may hold parts of characters, several words or
JSON's signs together. Letter: v the model's vocabulary, which may be wider
than the tokenizer's.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from moepeft.data.vocabulary import Bytes, Tokenizer, Vocabulary

# A text with what decoders are known to change: blanks, signs, accents.
_PROBE = 'It\'s {"a b": [1, true, "é  x"]} .'
# What a text may be tokenized after, for tokenizers that begin one otherwise.
_BEFORE = ('', '\n', '.', 'a')
_FALLBACK = re.compile('<0x([0-9A-Fa-f]{2})>')


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
  """A vocabulary as bytes.

  Attributes:
    spell: ids of a text as the tokenizer has them; any thread may call it.
    later: v byte strings, what each token is inside of a text; b'' for special
      ones, those that are none, and ids that only the model has.
    first: the same of a text's first token, which decoders of SentencePiece's
      kind take a blank from.
  """

  spell: Callable[[str], Sequence[int]]
  later: Sequence[bytes]
  first: Sequence[bytes]

  def encode(self, text: str) -> list[int]:
    """Ids whose bytes, inside of a text, are exactly this text's.

    As the tokenizer has them where it can, else the longest ones from the
    left; [] where no tokens make it up.
    """
    data = text.encode()
    for before in _BEFORE:
      found = self._suffix(self.spell(before + text), data)
      if found is not None:
        return found
    return self._greedy(data)

  def _suffix(self, ids: Sequence[int], data: bytes) -> list[int] | None:
    """The last ids whose bytes are the data, if some are."""
    left = len(data)
    for at in range(len(ids) - 1, -1, -1):
      piece = self._of(ids[at])
      left -= len(piece)
      if not piece or left < 0 or data[left : left + len(piece)] != piece:
        return None
      if not left:
        return [int(i) for i in ids[at:]]
    return None

  def _of(self, token: int) -> bytes:
    return self.later[token] if token < len(self.later) else b''

  def _greedy(self, data: bytes) -> list[int]:
    found, at = [], 0
    longest = max(map(len, self._ids), default=0)
    while at < len(data):
      sizes = range(min(longest, len(data) - at), 0, -1)
      size = next((n for n in sizes if data[at : at + n] in self._ids), None)
      if size is None:
        return []
      found.append(self._ids[data[at : at + size]])
      at += size
    return found

  @functools.cached_property
  def _ids(self) -> dict[bytes, int]:
    pairs = enumerate(self.later)
    return {piece: i for i, piece in reversed(list(pairs)) if piece}


def pieces(words: Vocabulary, size: int) -> Pieces:
  """The bytes of all tokens.

  Args:
    size: v.

  Raises:
    ValueError: the texts of the vocabulary are not those of its tokens one
      after the other.
  """
  if isinstance(words, Bytes):
    plain = [b'', b'', b'', *(bytes([i]) for i in range(256))]
    return _sized(words.encode, plain, plain, size)
  if not isinstance(words, Tokenizer):
    raise ValueError(
      f'constrained answers need the bytes of tokens; expected a vocabulary of '
      f'bytes or a Hugging Face tokenizer, got {words}'
    )
  found = _of_tokenizer(words, size)
  _check(words, found)
  return found


def _sized(
  spell: Callable[[str], Sequence[int]],
  later: Sequence[bytes],
  first: Sequence[bytes],
  size: int,
) -> Pieces:
  more = [b''] * max(0, size - len(later))
  return Pieces(spell, [*later, *more][:size], [*first, *more][:size])


def _of_tokenizer(words: Tokenizer, size: int) -> Pieces:
  own = words.tokenizer
  decoder = getattr(getattr(own, 'backend_tokenizer', None), 'decoder', None)
  if decoder is None:
    raise ValueError(
      f'the tokenizer {words} has no decoder of its own; constrained answers '
      'need a fast tokenizer (tokenizer.json)'
    )
  added = own.added_tokens_decoder
  special = {i for i, token in added.items() if token.special}
  special.update(own.all_special_ids)
  vocabulary = own.get_vocab()
  later = [b''] * (1 + max(vocabulary.values()))
  first = list(later)
  one = _reader(decoder)
  for text, i in vocabulary.items():
    if i not in special:
      first[i], later[i] = one(text)
  return _sized(_speller(own.backend_tokenizer), later, first, size)


def _speller(backend: Any) -> Callable[[str], Sequence[int]]:
  """text -> ids, by a tokenizer of its own.

  `transformers` sets what is cut and padded at each call, in which no other
  thread may read the same one.
  """
  # Imported here, as it is where tokenizers are read.
  import tokenizers

  own = tokenizers.Tokenizer.from_str(backend.to_str())
  own.no_truncation()
  own.no_padding()
  return lambda text: own.encode(text, add_special_tokens=False).ids


def _reader(decoder: Any):
  """token -> (its bytes as a text's first, and later on)."""
  made = json.loads(decoder.__getstate__())
  kinds = {made['type'], *(d['type'] for d in made.get('decoders', ()))}
  letters = alphabet() if kinds == {'ByteLevel'} else None

  def read(text: str) -> tuple[bytes, bytes]:
    if letters is not None:
      known = all(letter in letters for letter in text)
      same = bytes(map(letters.get, text)) if known else text.encode()
      return same, same
    byte = _FALLBACK.fullmatch(text)
    if byte and 'ByteFallback' in kinds:
      same = bytes.fromhex(byte[1])
      return same, same
    # After a letter, which no decoder changes.
    return decoder.decode([text]).encode(), decoder.decode(['a', text])[
      1:
    ].encode()

  return read


@functools.cache
def alphabet() -> dict[str, int]:
  """The letters that byte-level tokenizers write bytes with (GPT-2's)."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = (i for i in range(256) if i not in shown)
  return {chr(i): i for i in shown} | {
    chr(256 + n): i for n, i in enumerate(others)
  }


def _check(words: Tokenizer, found: Pieces) -> None:
  size = len(found.later)
  ids = [i for i in words.encode(_PROBE) if i < size and found.later[i]]
  ours = b''.join([found.first[i] for i in ids[:1]])
  ours += b''.join(found.later[i] for i in ids[1:])
  theirs = words.decode(ids)
  if ours.decode(errors='replace') != theirs:
    raise ValueError(
      f'the tokenizer {words} decodes {_PROBE!r} to {theirs!r}, but its tokens '
      f'one by one are {ours!r}; constrained answers need a tokenizer whose '
      'texts are its tokens in a row'
    )
