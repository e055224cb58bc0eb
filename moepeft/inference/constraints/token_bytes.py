# SPDX-License-Identifier: Apache-2.0
"""The bytes that each token adds to a text, of any vocabulary.

A grammar is over bytes: tokens may hold parts of characters, several words or
JSON's signs together. Letter: v the model's vocabulary, which may be wider
than the tokenizer's.
"""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
  Tokenizer,
)
from moepeft.inference.constraints.grammar_worker import Pieces

# A text with what decoders are known to change: blanks, signs, accents.
_PROBE = 'It\'s {"a b": [1, true, "é  x"]} .'
_FALLBACK = re.compile('<0x([0-9A-Fa-f]{2})>')


def pieces(words: Tokenizer, size: int) -> Pieces:
  """The bytes of all tokens.

  Args:
    size: v.

  Raises:
    ValueError: the texts of the vocabulary are not those of its tokens one
      after the other.
  """
  if isinstance(words, ByteTokenizer):
    plain = [b'', b'', b'', *(bytes([i]) for i in range(256))]
    return _sized('', plain, plain, size)
  if not isinstance(words, HuggingFaceTokenizer):
    raise ValueError(
      f'constrained answers need the bytes of tokens; expected a vocabulary of '
      f'bytes or a Hugging Face tokenizer, got {words}'
    )
  table = _of_tokenizer(words, size)
  _check(words, table)
  return table


def _sized(
  tokenizer: str,
  later: Sequence[bytes],
  first: Sequence[bytes],
  size: int,
) -> Pieces:
  more = [b''] * max(0, size - len(later))
  return Pieces(tokenizer, [*later, *more][:size], [*first, *more][:size])


def _of_tokenizer(words: HuggingFaceTokenizer, size: int) -> Pieces:
  tokenizer = words.tokenizer
  decoder = getattr(
    getattr(tokenizer, 'backend_tokenizer', None), 'decoder', None
  )
  if decoder is None:
    raise ValueError(
      f'the tokenizer {words} has no decoder of its own; constrained answers '
      'need a fast tokenizer (tokenizer.json)'
    )
  added = tokenizer.added_tokens_decoder
  special = {i for i, token in added.items() if token.special}
  special.update(tokenizer.all_special_ids)
  vocabulary = tokenizer.get_vocab()
  later = [b''] * (1 + max(vocabulary.values()))
  first = list(later)
  read = _reader(decoder)
  for text, i in vocabulary.items():
    if i not in special:
      first[i], later[i] = read(text)
  return _sized(tokenizer.backend_tokenizer.to_str(), later, first, size)


def _reader(decoder: Any):
  """token -> (its bytes as a text's first, and later on)."""
  decoder_json = json.loads(decoder.__getstate__())
  kinds = {
    decoder_json['type'],
    *(d['type'] for d in decoder_json.get('decoders', ())),
  }
  letters = alphabet() if kinds == {'ByteLevel'} else None

  def read(text: str) -> tuple[bytes, bytes]:
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


def _check(words: HuggingFaceTokenizer, table: Pieces) -> None:
  size = len(table.later)
  ids = [i for i in words.encode(_PROBE) if i < size and table.later[i]]
  joined = b''.join([table.first[i] for i in ids[:1]])
  joined += b''.join(table.later[i] for i in ids[1:])
  decoded = words.decode(ids)
  if joined.decode(errors='replace') != decoded:
    raise ValueError(
      f'the tokenizer {words} decodes {_PROBE!r} to {decoded!r}, but its '
      f'tokens one by one are {joined!r}; constrained answers need a '
      'tokenizer whose texts are its tokens in a row'
    )
