# SPDX-License-Identifier: Apache-2.0
"""Splits plain text into chunks and builds training items from them.

Documents are concatenated, each with EOS after it and, for a decoder, BOS
before it if the tokenizer has one. The result is split into chunks of a row's
length. With packing, each document is split by itself, so that no row attends
to two documents.
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

PRETRAINING_OBJECTIVES = ('next', 'spans', 'prefix')
# (ids of a chunk, random generator) -> a Sample, or a pair of ids.
ItemFn = Callable[[np.ndarray, np.random.Generator], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class TextChunks(Sequence):
  """Chunks of tokenized text.

  Attributes:
    ids: int32 [tokens].
    bounds: int64 [chunks, 2], start and end of each chunk in `ids`.
    item_fn: builds a training item from a chunk.
    notes: lines for the user.
  """

  ids: np.ndarray
  bounds: np.ndarray
  item_fn: ItemFn
  notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.bounds)

  def __getitem__(self, index: int) -> np.ndarray:
    start, end = self.bounds[index]
    return self.ids[start:end]

  def split(self, held_out: float) -> tuple['TextChunks', 'TextChunks']:
    """Splits the chunks into (training, validation); validation comes last.

    Args:
      held_out: the fraction of chunks that become validation.

    Raises:
      ValueError: no chunk is left to train on.
    """
    cut = len(self) - int(round(len(self) * held_out))
    if not cut:
      raise ValueError(
        f'config.data.validation_fraction={held_out} leaves no text to train '
        'on; lower it'
      )
    return (
      dataclasses.replace(self, bounds=self.bounds[:cut]),
      dataclasses.replace(self, bounds=self.bounds[cut:]),
    )

  def random_items(
    self, chunks: grain.MapDataset, seed: int
  ) -> grain.MapDataset:
    """Builds an item from each chunk; each has its own random generator."""
    # A local name, so that the closure does not hold the ids.
    item_fn = self.item_fn

    def make_item(index: int, ids: np.ndarray):
      return item_fn(ids, np.random.default_rng((seed, 1, index)))

    return chunks.map_with_index(make_item)

  def fixed_items(self, seed: int) -> list:
    """Builds an item from each chunk, the same at each call."""
    return [
      self.item_fn(ids, np.random.default_rng((seed, 2, i)))
      for i, ids in enumerate(self)
    ]


def read_chunks(
  data: ConfigDict, collator: Collator, path: str, vocab_size: int = 0
) -> TextChunks:
  """Reads the text under a path and splits it into a collator's chunks.

  Args:
    vocab_size: the size of the model's vocabulary, whose last ids are the
      sentinels of the byte tokenizer.

  Raises:
    ValueError: there is no text, or config.data does not fit the model.
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
  length, item_fn = chunk_maker(data, collator, vocab_size)
  texts, filter_notes = documents.filter_documents(
    texts, data.quality_filters, data.dedup_threshold
  )
  notes += filter_notes
  encoded = encode_documents(
    collator.tokenizer, texts, isinstance(collator, CausalCollator)
  )
  if not collator.packed:
    encoded = [np.concatenate(encoded)]
  # Next-token prediction does not predict the first token of a chunk, so chunks
  # overlap by one token.
  step = length - 1 if data.pretraining_objective == 'next' else length
  starts = np.cumsum([0, *map(len, encoded)])
  bounds = [
    (start + offset, min(start + offset + length, start + len(ids)))
    for start, ids in zip(starts, encoded, strict=False)
    for offset in range(0, len(ids) - 1, step)
  ]
  ids = np.concatenate(encoded)
  notes.append(
    f'{path}: {len(ids):,} tokens of {len(texts):,} documents in '
    f'{len(bounds):,} chunks of up to {length:,}'
  )
  return TextChunks(ids, np.array(bounds, np.int64), item_fn, tuple(notes))


def encode_documents(
  tokenizer: Tokenizer, texts: Sequence[Document], add_bos: bool = False
) -> list[np.ndarray]:
  """Tokenizes documents to int32 [n] each, with EOS.

  Args:
    add_bos: whether to add BOS, if the tokenizer has one.
  """
  bos = [tokenizer.bos] if add_bos and tokenizer.bos is not None else []
  eos = [require_eos(tokenizer)]
  encoded = tokenizer.encode_all(
    [document.separator.join(document.passages) for document in texts]
  )
  return [
    np.concatenate([np.asarray(x, np.int32) for x in (bos, ids, eos)])
    for ids in encoded
  ]


def chunk_maker(
  data: ConfigDict, collator: Collator, vocab_size: int
) -> tuple[int, ItemFn]:
  """(tokens in a chunk, function that builds an item from it), by config.data.

  Raises:
    ValueError: config.data.pretraining_objective is unknown, or does not fit
      the model.
  """
  if data.pretraining_objective not in PRETRAINING_OBJECTIVES:
    raise ValueError(
      'config.data.pretraining_objective is one of '
      f'{", ".join(PRETRAINING_OBJECTIVES)}; got {data.pretraining_objective!r}'
    )
  if data.pretraining_objective == 'spans':
    return _span_corruption(data, collator, vocab_size)
  if data.pretraining_objective == 'prefix':
    return _prefix_lm(collator)
  if not isinstance(collator, CausalCollator):
    raise ValueError(
      "config.data.pretraining_objective='next' needs a decoder-only model; "
      "set it to 'spans' or 'prefix' for an encoder-decoder"
    )
  return collator.max_lengths[0] + 1, lambda ids, rng: Sample(
    ids, np.ones(len(ids), bool)
  )


def _prefix_lm(collator: Collator) -> tuple[int, ItemFn]:
  """The targets are the continuation of a prefix of random length.

  An encoder attends to the prefix in both directions, as in the prefix LM of
  arXiv:1910.10683, section 3.2.1. A decoder attends causally, as it does to
  prompts, so that only the loss mask differs from 'next'.
  """
  if isinstance(collator, CausalCollator):

    def make_sample(ids, rng):
      cut = rng.integers(1, len(ids))
      return decoder_only.make_sample(ids[:cut], ids[cut:])

    return collator.max_lengths[0] + 1, make_sample
  inputs_length, targets_length = collator.max_lengths
  eos = np.int32(require_eos(collator.tokenizer))

  def make_pair(ids, rng):
    # Neither part is empty, and the targets fit.
    cut = rng.integers(max(1, len(ids) - targets_length + 1), len(ids))
    return np.append(ids[:cut], eos), np.append(ids[cut:], eos)

  return inputs_length, make_pair


def _span_corruption(
  data: ConfigDict, collator: Collator, vocab_size: int
) -> tuple[int, ItemFn]:
  """The targets are the noise spans; a decoder's row has inputs and targets."""
  density, mean_span = data.noise_density, data.mean_noise_span_length
  eos = require_eos(collator.tokenizer)
  if not 0 < density < 1 or mean_span < 1:
    raise ValueError(
      'config.data.noise_density is a fraction of the tokens, above 0 and '
      'below 1, and config.data.mean_noise_span_length is at least 1; got '
      f'{density} and {mean_span}'
    )
  if isinstance(collator, CausalCollator):
    max_length = collator.max_lengths[0] + 1
    length = span_corruption.max_length(
      lambda x, y: x + y <= max_length, density, mean_span
    )
  else:
    inputs_length, targets_length = collator.max_lengths
    length = span_corruption.max_length(
      lambda x, y: x <= inputs_length, density, mean_span
    )
    needed = span_corruption.sizes(length, density, mean_span)[1]
    if needed > targets_length:
      raise ValueError(
        f'span corruption of {inputs_length} inputs has {needed} targets '
        f'(config.data.noise_density={density}, '
        f'config.data.mean_noise_span_length={mean_span}); set '
        f'config.data.targets_length to {needed}, it is {targets_length}'
      )
  sentinels = collator.tokenizer.sentinels(vocab_size)
  needed = span_corruption.counts(length, density, mean_span)[1]
  if needed > len(sentinels):
    raise ValueError(
      f'chunks of {length} tokens have {needed} noise spans, and '
      f'{collator.tokenizer} has {len(sentinels)} sentinels (<extra_id_0>, '
      "...; for bytes, the model's ids from 259 on); use a vocabulary that "
      'has them, shorten the rows or raise config.data.mean_noise_span_length'
    )

  def make_item(ids, rng):
    noise_mask = span_corruption.noise_mask(len(ids), density, mean_span, rng)
    inputs, targets = span_corruption.corrupt(ids, noise_mask, sentinels, eos)
    if isinstance(collator, CausalCollator):
      return decoder_only.make_sample(inputs, targets)
    return inputs, targets

  return length, make_item
