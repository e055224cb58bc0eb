# SPDX-License-Identifier: Apache-2.0
"""The bytes that each token adds to a text, of any vocabulary.

Tokens may hold parts of characters, several words or JSON's signs together:
grammars and reported log-probabilities are over bytes.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
  Tokenizer,
)

# A text with what decoders are known to change: blanks, signs, accents.
_PROBE = 'It\'s {"a b": [1, true, "é  x"]} .'
_FALLBACK = re.compile('<0x([0-9A-Fa-f]{2})>')
# A token's bytes as a text's first, and later on.
Bytes = tuple[bytes, bytes]


class TokenBytes:
  """The bytes of a tokenizer's tokens."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    # {id: content} of tokens that are no text.
    self._special: dict[int, str] = {}
    self._read: Callable[[str], Bytes] | None = None
    if isinstance(tokenizer, HuggingFaceTokenizer):
      added = tokenizer.tokenizer.added_tokens_decoder
      self._special = {
        i: token.content for i, token in added.items() if token.special
      }
      ids = tokenizer.tokenizer.all_special_ids
      contents = tokenizer.tokenizer.all_special_tokens
      self._special |= dict(zip(ids, contents, strict=False))
      backend = getattr(tokenizer.tokenizer, 'backend_tokenizer', None)
      if getattr(backend, 'decoder', None) is not None:
        self._read = _reader(backend.decoder)

  def __getitem__(self, i: int) -> bytes:
    """A token's bytes inside of a text; a special token's content.

    b'' of an id that stands for nothing.
    """
    if not isinstance(self._tokenizer, HuggingFaceTokenizer):
      return bytes([i - 3]) if 3 <= i < 259 else b''
    if i in self._special:
      return self._special[i].encode()
    # Ids beyond the tokenizer are the model's padding.
    in_tokenizer = i < self._tokenizer.size
    text = (
      self._tokenizer.tokenizer.convert_ids_to_tokens(i)
      if in_tokenizer
      else None
    )
    if text is None:
      return b''
    return text.encode() if self._read is None else self._read(text)[1]

  def table(self, size: int) -> tuple[list[bytes], list[bytes]]:
    """(bytes as a text's first token, and later on) of all ids below `size`.

    b'' of special tokens and of ids that stand for nothing.

    Raises:
      ValueError: the texts of the vocabulary are not those of its tokens one
        after the other.
    """
    tokenizer = self._tokenizer
    if isinstance(tokenizer, ByteTokenizer):
      rows = [self[i] for i in range(size)]
      return rows, rows
    if not isinstance(tokenizer, HuggingFaceTokenizer):
      raise ValueError(
        'constrained answers need the bytes of tokens; expected a vocabulary '
        f'of bytes or a Hugging Face tokenizer, got {tokenizer}'
      )
    if self._read is None:
      raise ValueError(
        f'the tokenizer {tokenizer} has no decoder of its own; constrained '
        'answers need a fast tokenizer (tokenizer.json)'
      )
    first, later = [b''] * size, [b''] * size
    for text, i in tokenizer.tokenizer.get_vocab().items():
      if i < size and i not in self._special:
        first[i], later[i] = self._read(text)
    _check(tokenizer, first, later)
    return first, later


def _reader(decoder: Any) -> Callable[[str], Bytes]:
  """The function from a token of the vocabulary to its bytes."""
  decoder_json = json.loads(decoder.__getstate__())
  kinds = {
    decoder_json['type'],
    *(d['type'] for d in decoder_json.get('decoders', ())),
  }
  letters = alphabet() if 'ByteLevel' in kinds else None

  def read(text: str) -> Bytes:
    if letters is not None:
      byte_level = all(letter in letters for letter in text)
      same = bytes(map(letters.get, text)) if byte_level else text.encode()
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
  rest = (i for i in range(256) if i not in shown)
  return {chr(i): i for i in shown} | {
    chr(256 + n): i for n, i in enumerate(rest)
  }


def _check(
  tokenizer: HuggingFaceTokenizer,
  first: Sequence[bytes],
  later: Sequence[bytes],
) -> None:
  probe = tokenizer.encode(_PROBE)
  ids = [i for i in probe if i < len(later) and later[i]]
  joined = b''.join([first[i] for i in ids[:1]])
  joined += b''.join(later[i] for i in ids[1:])
  decoded = tokenizer.decode(ids)
  if joined.decode(errors='replace') != decoded:
    raise ValueError(
      f'the tokenizer {tokenizer} decodes {_PROBE!r} to {decoded!r}, but its '
      f'tokens one by one are {joined!r}; constrained answers need a '
      'tokenizer whose texts are its tokens in a row'
    )
