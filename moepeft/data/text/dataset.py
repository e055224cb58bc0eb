# SPDX-License-Identifier: Apache-2.0
"""Plain text cut into pieces, and what is predicted of each.

Documents follow one another, each with EOS at its end (and, where a decoder
reads them, with what the tokenizer begins texts with before it, if anything),
and are cut wherever a row is full; where rows are packed, every document is cut
by itself, and nothing sees another document.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from moepeft.data.batching import decoder_only
from moepeft.data.batching.collators import Collator
from moepeft.data.batching.decoder_only import CausalCollator, Sample
from moepeft.data.text import documents, span_corruption
from moepeft.data.text.documents import Document
from moepeft.data.tokenizers.tokenizer import Tokenizer, require_eos

PREDICT = ('next', 'spans', 'prefix')
# (ids, what is drawn from) -> a Sample, or a pair of ids.
Make = Callable[[np.ndarray, np.random.Generator], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class TextChunks(Sequence):
  """Pieces of text as ids.

  Attributes:
    ids: int32 [tokens].
    bounds: int64 [pieces, 2], where each begins and ends.
    make: what is predicted of one.
    notes: lines for the user.
  """

  ids: np.ndarray
  bounds: np.ndarray
  make: Make
  notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.bounds)

  def __getitem__(self, place: int) -> np.ndarray:
    start, end = self.bounds[place]
    return self.ids[start:end]

  def split(self, held_out: float) -> tuple['TextChunks', 'TextChunks']:
    """(training, validation): the last `held_out` of the pieces.

    Raises:
      ValueError: nothing is left to train on.
    """
    cut = len(self) - int(round(len(self) * held_out))
    if not cut:
      raise ValueError(f'held_out={held_out} leaves no text to train on')
    parts = self.bounds[:cut], self.bounds[cut:]
    train, rest = (dataclasses.replace(self, bounds=part) for part in parts)
    return train, rest

  def prepared(self, drawn: grain.MapDataset, seed: int) -> grain.MapDataset:
    """Training items of the chunks, drawn anew at each place."""
    make = self.make

    def prepare(place: int, ids: np.ndarray):
      return make(ids, np.random.default_rng((seed, 1, place)))

    return drawn.map_with_index(prepare)

  def fixed(self, held_out: 'TextChunks', seed: int) -> list:
    """An item of each held-out chunk, the same every time."""
    return [
      self.make(ids, np.random.default_rng((seed, 2, i)))
      for i, ids in enumerate(held_out)
    ]


def read_chunks(
  data: ConfigDict, collator: Collator, path: str, below: int = 0
) -> TextChunks:
  """The text under a path, cut up for a form as config.data says.

  Args:
    below: the size of the model's vocabulary, at whose end sentinels are
      where the vocabulary is of bytes.

  Raises:
    ValueError: no text is there, or the model cannot predict it that way.
  """
  texts, bad = documents.read_documents(
    path, data.on_bad_row, data.ignore_fields
  )
  notes = (
    [
      f'skipped {len(bad.reasons):,} bad rows of {path}, the first: '
      f'{bad.reasons[0]}'
    ]
    if bad.reasons
    else []
  )
  notes += bad.notes(path)
  length, make = chunk_maker(data, collator, below)
  texts, filter_notes = documents.filter_documents(
    texts, data.quality_filters, data.dedup_threshold
  )
  notes += filter_notes
  encoded = encode_documents(
    collator.tokenizer, texts, isinstance(collator, CausalCollator)
  )
  if not collator.packed:
    encoded = [np.concatenate(encoded)]
  starts = np.cumsum([0, *map(len, encoded)])
  bounds = [
    (start + at, min(start + at + length, start + len(ids)))
    for start, ids in zip(starts, encoded, strict=False)
    # A piece begins with the token that the one before ended with, where all
    # but the first of each are predicted.
    for at in range(0, len(ids) - 1, _step(data, collator, length))
  ]
  ids = np.concatenate(encoded)
  notes.append(
    f'{path}: {len(ids):,} tokens of {len(texts):,} documents in '
    f'{len(bounds):,} pieces of up to {length:,}'
  )
  return TextChunks(ids, np.array(bounds, np.int64), make, tuple(notes))


def _step(data: ConfigDict, collator: Collator, length: int) -> int:
  return length - 1 if data.pretraining_objective == 'next' else length


def encode_documents(
  tokenizer: Tokenizer, texts: Sequence[Document], begun: bool = False
) -> list[np.ndarray]:
  """int32 [n] of each document: its text, passages and all, and EOS.

  Args:
    begun: whether what the tokenizer begins texts with comes before it.
  """
  start = [tokenizer.bos] if begun and tokenizer.bos is not None else []
  every = tokenizer.encode_all(
    [document.separator.join(document.passages) for document in texts]
  )
  ends = np.array(start, np.int32), np.array([require_eos(tokenizer)], np.int32)
  return [
    np.concatenate([ends[0], np.asarray(ids, np.int32), ends[1]])
    for ids in every
  ]


def chunk_maker(
  data: ConfigDict, collator: Collator, below: int
) -> tuple[int, Make]:
  """(tokens of a chunk, function that makes an item of it), by config.data.

  Raises:
    ValueError: there is no such way, or the model has not.
  """
  decoder = isinstance(collator, CausalCollator)
  if data.pretraining_objective not in PREDICT:
    raise ValueError(
      f'config.data.pretraining_objective is one of {", ".join(PREDICT)}; got '
      f'{data.pretraining_objective!r}'
    )
  if data.pretraining_objective == 'spans':
    return _spans(data, collator, below)
  if data.pretraining_objective == 'prefix':
    return _prefix(collator)
  if not decoder:
    raise ValueError(
      "config.data.pretraining_objective='next' is of decoder-only models; "
      "set it to 'spans' or 'prefix' for an encoder-decoder"
    )
  return collator.max_lengths[0] + 1, lambda ids, rng: Sample(
    ids, np.ones(len(ids), bool)
  )


def _prefix(collator: Collator) -> tuple[int, Make]:
  """The continuation of a prefix whose length is drawn.

  An encoder sees all of the prefix at once. A decoder reads it causally, as it
  reads prompts when it generates: only what is trained differs from 'next'. The
  prefix LM of arXiv:1910.10683, section 3.2.1, is bidirectional there.
  """
  if isinstance(collator, CausalCollator):

    def sample(ids, rng):
      cut = rng.integers(1, len(ids))
      return decoder_only.make_sample(ids[:cut], ids[cut:])

    return collator.max_lengths[0] + 1, sample
  most, answer = collator.max_lengths
  end = np.int32(require_eos(collator.tokenizer))

  def pair(ids, rng):
    # The suffix fits its side, and neither is empty.
    cut = rng.integers(max(1, len(ids) - answer + 1), len(ids))
    return np.append(ids[:cut], end), np.append(ids[cut:], end)

  return most, pair


def _spans(
  data: ConfigDict, collator: Collator, below: int
) -> tuple[int, Make]:
  """Hidden spans given the rest; a decoder reads both in one row."""
  noise, span, eos = (
    data.noise_density,
    data.mean_noise_span_length,
    require_eos(collator.tokenizer),
  )
  if not 0 < noise < 1 or span < 1:
    raise ValueError(
      'config.data.noise_density is a share of the tokens, above 0 and below '
      f'1, and config.data.mean_noise_span_length a length of at least 1; '
      f'got {noise} and {span}'
    )
  if isinstance(collator, CausalCollator):
    most = collator.max_lengths[0] + 1
    length = span_corruption.max_length(lambda x, y: x + y <= most, noise, span)
  else:
    most, targets_length = collator.max_lengths
    length = span_corruption.max_length(lambda x, y: x <= most, noise, span)
    needed = span_corruption.sizes(length, noise, span)[1]
    if needed > targets_length:
      raise ValueError(
        f'spans of {most} inputs have {needed} targets '
        f'(config.data.noise_density={noise}, '
        f'config.data.mean_noise_span_length={span}); set '
        f'config.data.targets_length to {needed}, it is {targets_length}'
      )
  sentinels = collator.tokenizer.sentinels(below)
  needed = span_corruption.counts(length, noise, span)[1]
  if needed > len(sentinels):
    raise ValueError(
      f'pieces of {length} tokens have {needed} hidden spans, and '
      f'{collator.tokenizer} has {len(sentinels)} sentinels (<extra_id_0>, '
      "...; of bytes, the model's ids from 259 on); give a vocabulary that "
      'has them, shorten the rows or raise config.data.mean_noise_span_length'
    )

  def make(ids, rng):
    hidden = span_corruption.noise_mask(len(ids), noise, span, rng)
    x, y = span_corruption.corrupt(ids, hidden, sentinels, eos)
    return (
      decoder_only.make_sample(x, y)
      if isinstance(collator, CausalCollator)
      else (x, y)
    )

  return length, make
