# SPDX-License-Identifier: Apache-2.0
"""Converts SentencePiece vocabularies (arXiv:1808.06226) of GGUF files.

The results are a fast tokenizer, and the `tokenizer.model` that llama.cpp's
converter reads. SentencePiece merges the pair of pieces with the best score
first. A fast tokenizer has merges instead of scores: each split of a piece into
two pieces is a merge with the rank of the piece.
"""

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from moepeft.models.weight_mapping import CheckpointError

SPACE = '\u2581'
# Values of `tokenizer.ggml.token_type`, the same as SentencePiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True)
class SentencePieces:
  """A SentencePiece vocabulary in order of ids.

  Attributes:
    texts: the pieces; normal pieces have SPACE for spaces.
    scores, types: the score and the type of each piece.
    add_prefix_space: whether a space is added before a text.
  """

  texts: tuple[str, ...]
  scores: tuple[float, ...]
  types: tuple[int, ...]
  add_prefix_space: bool = True

  @property
  def unknown(self) -> str | None:
    typed_texts = zip(self.texts, self.types, strict=True)
    return next((text for text, kind in typed_texts if kind == UNKNOWN), None)

  @property
  def has_bytes(self) -> bool:
    return BYTE in self.types

  def normal(self) -> dict[str, float]:
    """{text: score} of the normal pieces."""
    rows = zip(self.texts, self.scores, self.types, strict=True)
    return {text: score for text, score, kind in rows if kind == NORMAL}


def read(path: str, metadata: Mapping[str, Any]) -> SentencePieces:
  """Reads the pieces from the metadata of a 'llama' tokenizer.

  Raises:
    CheckpointError: the scores are not ranks of merges, as in a unigram model,
      or are missing.
  """
  texts = metadata['tokenizer.ggml.tokens']
  scores = metadata.get('tokenizer.ggml.scores', ())
  types = metadata.get('tokenizer.ggml.token_type', ())
  if not len(texts) == len(scores) == len(types) == len(set(texts)):
    raise CheckpointError(
      f'the tokenizer in {path} has {len(texts)} pieces, {len(set(texts))} of '
      f'them different, {len(scores)} scores and {len(types)} types: expected '
      'as many of each; convert the model again'
    )
  add_prefix_space = bool(metadata.get('tokenizer.ggml.add_space_prefix', True))
  pieces = SentencePieces(
    tuple(texts), tuple(scores), tuple(types), add_prefix_space
  )
  ranks = list(pieces.normal().values())
  if len(set(ranks)) < len(ranks) or any(r != int(r) for r in ranks):
    raise CheckpointError(
      f'the scores of the pieces in {path} are not ranks of merges (distinct '
      'whole numbers), so its tokenizer cannot be reproduced: set '
      'config.data.tokenizer to a directory with the tokenizer.json of the '
      'model'
    )
  return pieces


def tokenizer(pieces: SentencePieces) -> Any:
  """Makes a `tokenizers.Tokenizer` equal to the SentencePiece tokenizer."""
  from tokenizers import Tokenizer, decoders, models, normalizers

  bpe = models.BPE(
    vocab={text: i for i, text in enumerate(pieces.texts)},
    merges=merges(pieces),
    unk_token=pieces.unknown,
    fuse_unk=True,
    byte_fallback=pieces.has_bytes,
  )
  fast_tokenizer = Tokenizer(bpe)
  prepend = [normalizers.Prepend(SPACE)] if pieces.add_prefix_space else []
  strip = (
    [decoders.Strip(content=' ', left=1)] if pieces.add_prefix_space else []
  )
  fast_tokenizer.normalizer = normalizers.Sequence(
    [*prepend, normalizers.Replace(' ', SPACE)]
  )
  fast_tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(SPACE, ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *strip,
    ]
  )
  return fast_tokenizer


def merges(pieces: SentencePieces) -> list[tuple[str, str]]:
  """All splits of pieces into two pieces, in order of descending scores."""
  scores = pieces.normal()
  sorted_pieces = sorted(scores, key=scores.get, reverse=True)
  return [
    (piece[:i], piece[i:])
    for piece in sorted_pieces
    for i in range(1, len(piece))
    if piece[:i] in scores and piece[i:] in scores
  ]


def model_file(pieces: SentencePieces, ids: Mapping[str, int | None]) -> bytes:
  """The bytes of a `tokenizer.model`.

  The format is the protocol buffer sentencepiece_model.proto.

  Args:
    ids: 'bos_token_id', 'eos_token_id' and 'pad_token_id', if known.
  """
  parts = [
    _bytes_field(1, _encode_piece(*piece)) for piece in _stored_pieces(pieces)
  ]
  # SentencePiece writes -1 for missing tokens.
  special_ids = {
    name: -1 if ids.get(f'{name}_token_id') is None else ids[f'{name}_token_id']
    for name in ('bos', 'eos', 'pad')
  }
  unknown = pieces.types.index(UNKNOWN) if UNKNOWN in pieces.types else 0
  trainer_spec = _int_field(3, 2) + _int_field(4, len(pieces.texts))
  trainer_spec += _int_field(35, int(pieces.has_bytes)) + _int_field(
    40, unknown
  )
  trainer_spec += _int_field(41, special_ids['bos']) + _int_field(
    42, special_ids['eos']
  )
  trainer_spec += _int_field(43, special_ids['pad'])
  # No normalization except of spaces.
  normalizer_spec = (
    _bytes_field(1, b'identity')
    + _int_field(3, int(pieces.add_prefix_space))
    + _int_field(4, 0)
  )
  return (
    b''.join(parts)
    + _bytes_field(2, trainer_spec)
    + _bytes_field(3, normalizer_spec)
  )


def _stored_pieces(pieces: SentencePieces) -> Iterator[tuple[str, float, int]]:
  for text, score, kind in zip(
    pieces.texts, pieces.scores, pieces.types, strict=True
  ):
    # GGUF files have spaces for SPACE in user-defined pieces.
    stored_text = text.replace(' ', SPACE) if kind == USER_DEFINED else text
    yield stored_text, score, kind


def _encode_piece(text: str, score: float, kind: int) -> bytes:
  number = b'\x15' + struct.pack('<f', score)
  return _bytes_field(1, text.encode()) + number + _int_field(3, kind)


def _bytes_field(field: int, value: bytes) -> bytes:
  return _varint(field << 3 | 2) + _varint(len(value)) + value


def _int_field(field: int, value: int) -> bytes:
  return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
  """Encodes seven bits per byte, lowest first; negative values as uint64."""
  value &= 2**64 - 1
  encoded = bytearray()
  while value > 127:
    encoded.append(value & 127 | 128)
    value >>= 7
  return bytes([*encoded, value])
