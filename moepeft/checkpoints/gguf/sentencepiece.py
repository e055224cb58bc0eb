# SPDX-License-Identifier: Apache-2.0
"""SentencePiece vocabularies (arXiv:1808.06226) as GGUF files list them: as a
fast tokenizer, and as the `tokenizer.model` that llama.cpp's converter reads.

Pieces have a score each, and text is merged pair by pair, the best score
first. A fast tokenizer knows merges and no scores: every way in which a piece
is two others is a merge of that piece's rank.
"""

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from moepeft.models.weight_mapping import CheckpointError

SPACE = '\u2581'
# `tokenizer.ggml.token_type`, which are SentencePiece's own.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True)
class SentencePieces:
  """A vocabulary, by id.

  Attributes:
    texts: the pieces; spaces in those that text is merged to are SPACE.
    scores, types: one each.
    add_prefix_space: whether texts get a space at their start.
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
    """{text: score} of what text is merged to."""
    rows = zip(self.texts, self.scores, self.types, strict=True)
    return {text: score for text, score, kind in rows if kind == NORMAL}


def read(path: str, metadata: Mapping[str, Any]) -> SentencePieces:
  """Reads the pieces of a file whose `tokenizer.ggml.model` is 'llama'.

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
      f'the scores of the pieces in {path} are not the ranks of merges (whole '
      'numbers, each once), so texts can not be cut as in its training: set '
      'config.data.tokenizer to a directory with the tokenizer.json of the '
      'model'
    )
  return pieces


def tokenizer(pieces: SentencePieces) -> Any:
  """A `tokenizers.Tokenizer` that cuts text as SentencePiece does."""
  from tokenizers import Tokenizer, decoders, models, normalizers

  bpe = models.BPE(
    vocab={text: i for i, text in enumerate(pieces.texts)},
    merges=merges(pieces),
    unk_token=pieces.unknown,
    fuse_unk=True,
    byte_fallback=pieces.has_bytes,
  )
  result = Tokenizer(bpe)
  before = [normalizers.Prepend(SPACE)] if pieces.add_prefix_space else []
  after = (
    [decoders.Strip(content=' ', left=1)] if pieces.add_prefix_space else []
  )
  result.normalizer = normalizers.Sequence(
    [*before, normalizers.Replace(' ', SPACE)]
  )
  result.decoder = decoders.Sequence(
    [
      decoders.Replace(SPACE, ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *after,
    ]
  )
  return result


def merges(pieces: SentencePieces) -> list[tuple[str, str]]:
  """Every way in which a piece is two others, best pieces first."""
  scores = pieces.normal()
  ranked = sorted(scores, key=scores.get, reverse=True)
  return [
    (piece[:i], piece[i:])
    for piece in ranked
    for i in range(1, len(piece))
    if piece[:i] in scores and piece[i:] in scores
  ]


def model_file(pieces: SentencePieces, ids: Mapping[str, int | None]) -> bytes:
  """The content of a `tokenizer.model`.

  It is a protocol buffer, sentencepiece_model.proto of google/sentencepiece.

  Args:
    ids: 'bos_token_id', 'eos_token_id' and 'pad_token_id', where known.
  """
  parts = [_bytes(1, _piece(*piece)) for piece in _listed(pieces)]
  # What is not there is -1, in the ten bytes of a negative number.
  special_ids = {
    name: -1 if ids.get(f'{name}_token_id') is None else ids[f'{name}_token_id']
    for name in ('bos', 'eos', 'pad')
  }
  unknown = pieces.types.index(UNKNOWN) if UNKNOWN in pieces.types else 0
  trained = _int(3, 2) + _int(4, len(pieces.texts))
  trained += _int(35, int(pieces.has_bytes)) + _int(40, unknown)
  trained += _int(41, special_ids['bos']) + _int(42, special_ids['eos'])
  trained += _int(43, special_ids['pad'])
  # The text as it is but for its spaces.
  changed = (
    _bytes(1, b'identity') + _int(3, int(pieces.add_prefix_space)) + _int(4, 0)
  )
  return b''.join(parts) + _bytes(2, trained) + _bytes(3, changed)


def _listed(pieces: SentencePieces) -> Iterator[tuple[str, float, int]]:
  for text, score, kind in zip(
    pieces.texts, pieces.scores, pieces.types, strict=True
  ):
    # llama.cpp's converter wrote the spaces of these as spaces.
    stored_text = text.replace(' ', SPACE) if kind == USER_DEFINED else text
    yield stored_text, score, kind


def _piece(text: str, score: float, kind: int) -> bytes:
  number = b'\x15' + struct.pack('<f', score)
  return _bytes(1, text.encode()) + number + _int(3, kind)


def _bytes(field: int, value: bytes) -> bytes:
  return _varint(field << 3 | 2) + _varint(len(value)) + value


def _int(field: int, value: int) -> bytes:
  return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
  """Seven bits a byte, lowest first; negative ones as of 64 bits."""
  value &= 2**64 - 1
  encoded = bytearray()
  while value > 127:
    encoded.append(value & 127 | 128)
    value >>= 7
  return bytes([*encoded, value])
