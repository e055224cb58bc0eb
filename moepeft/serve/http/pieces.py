# SPDX-License-Identifier: Apache-2.0
"""The bytes that each token stands for, as log-probabilities name them.

A token may be a part of a character, so its text alone is not enough. Here
special tokens have names too, which `inference.constraints.token_bytes` leaves
out: nothing constrained is made of them.
"""

import json
import re
from collections.abc import Callable

from moepeft.data.tokenizers.tokenizer import Tokenizer, Vocabulary
from moepeft.inference.constraints.token_bytes import alphabet

Piece = Callable[[int], bytes]
# How SentencePiece writes a byte, and a space.
_BYTE = re.compile(r'<0x([0-9A-Fa-f]{2})>')
_SPACE = '▁'


def pieces(words: Vocabulary) -> Piece:
  """id -> bytes; b'' of an id that stands for nothing."""
  if isinstance(words, Tokenizer):
    return _of(words.tokenizer)
  return lambda i: bytes([i - 3]) if 3 <= i < 259 else b''


def _of(tokenizer) -> Piece:
  backend = json.loads(tokenizer.backend_tokenizer.to_str())
  byte_level = '"ByteLevel"' in json.dumps(backend['decoder'])
  letters = alphabet() if byte_level else {}
  added = {item['id']: item['content'] for item in backend['added_tokens']}

  def piece(i: int) -> bytes:
    if i in added:
      return added[i].encode()
    # Ids beyond the tokenizer are the model's padding.
    text = tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else None
    if text is None:
      return b''
    if letters and all(c in letters for c in text):
      return bytes(letters[c] for c in text)
    if byte := _BYTE.fullmatch(text):
      return bytes.fromhex(byte[1])
    return text.replace(_SPACE, ' ').encode()

  return piece


def name(piece: bytes) -> str:
  """A token's bytes as text; 'bytes:\\xe2\\x82' where they are no characters,
  as OpenAI's legacy completions write it."""
  try:
    return piece.decode()
  except UnicodeDecodeError:
    return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in piece)
