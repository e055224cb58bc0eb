# SPDX-License-Identifier: Apache-2.0
"""The bytes of each token of a tokenizer.

Grammars and the reported log-probabilities need bytes, because a token may be a
part of a character.
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

# A text with what decoders are known to change: spaces, punctuation, accents.
_TEST_TEXT = 'It\'s {"a b": [1, true, "é  x"]} .'
_BYTE_FALLBACK = re.compile('<0x([0-9A-Fa-f]{2})>')
# (the bytes of a token at the start of a text, and elsewhere).
Bytes = tuple[bytes, bytes]


class TokenBytes:
  """The bytes of a tokenizer's tokens."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    # {id: content}.
    self._special: dict[int, str] = {}
    self._to_bytes: Callable[[str], Bytes] | None = None
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
        self._to_bytes = _make_to_bytes(backend.decoder)

  def __getitem__(self, i: int) -> bytes:
    """The bytes of a token inside a text, or the content of a special token.

    They are b'' for an unused id.
    """
    if not isinstance(self._tokenizer, HuggingFaceTokenizer):
      return bytes([i - 3]) if 3 <= i < 259 else b''
    if i in self._special:
      return self._special[i].encode()
    # The model's vocabulary may be padded.
    in_tokenizer = i < self._tokenizer.size
    text = (
      self._tokenizer.tokenizer.convert_ids_to_tokens(i)
      if in_tokenizer
      else None
    )
    if text is None:
      return b''
    return text.encode() if self._to_bytes is None else self._to_bytes(text)[1]

  def table(self, size: int) -> tuple[list[bytes], list[bytes]]:
    """The bytes of all ids below `size`, at the start of a text and elsewhere.

    They are b'' for special tokens and unused ids.

    Raises:
      ValueError: the tokenizer does not decode tokens one by one.
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
    if self._to_bytes is None:
      raise ValueError(
        f'the tokenizer {tokenizer} has no decoder of its own; constrained '
        'answers need a fast tokenizer (tokenizer.json)'
      )
    first, later = [b''] * size, [b''] * size
    for text, i in tokenizer.tokenizer.get_vocab().items():
      if i < size and i not in self._special:
        first[i], later[i] = self._to_bytes(text)
    _check(tokenizer, first, later)
    return first, later


def _make_to_bytes(decoder: Any) -> Callable[[str], Bytes]:
  """Makes the function from a token of the vocabulary to its bytes."""
  decoder_json = json.loads(decoder.__getstate__())
  decoder_types = {
    decoder_json['type'],
    *(d['type'] for d in decoder_json.get('decoders', ())),
  }
  alphabet = byte_alphabet() if 'ByteLevel' in decoder_types else None

  def to_bytes(text: str) -> Bytes:
    if alphabet is not None:
      byte_level = all(char in alphabet for char in text)
      token_bytes = (
        bytes(map(alphabet.get, text)) if byte_level else text.encode()
      )
      return token_bytes, token_bytes
    byte = _BYTE_FALLBACK.fullmatch(text)
    if byte and 'ByteFallback' in decoder_types:
      token_bytes = bytes.fromhex(byte[1])
      return token_bytes, token_bytes
    # After an 'a', which no decoder changes.
    return decoder.decode([text]).encode(), decoder.decode(['a', text])[
      1:
    ].encode()

  return to_bytes


@functools.cache
def byte_alphabet() -> dict[str, int]:
  """{character: byte} of byte-level tokenizers (GPT-2's)."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  unprintable = (i for i in range(256) if i not in printable)
  return {chr(i): i for i in printable} | {
    chr(256 + n): i for n, i in enumerate(unprintable)
  }


def _check(
  tokenizer: HuggingFaceTokenizer,
  first: Sequence[bytes],
  later: Sequence[bytes],
) -> None:
  test_ids = tokenizer.encode(_TEST_TEXT)
  ids = [i for i in test_ids if i < len(later) and later[i]]
  token_text = b''.join([first[i] for i in ids[:1]])
  token_text += b''.join(later[i] for i in ids[1:])
  decoded = tokenizer.decode(ids)
  if token_text.decode(errors='replace') != decoded:
    raise ValueError(
      f'the tokenizer {tokenizer} decodes {_TEST_TEXT!r} to {decoded!r}, but '
      f'its tokens one by one to {token_text!r}; constrained answers need a '
      'tokenizer that decodes tokens one by one'
    )
