# SPDX-License-Identifier: Apache-2.0
"""Collators: from examples to batches of encoder-decoders or decoders."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from moepeft.data.batching import packing, seq2seq
from moepeft.data.batching import packing as batching_packing
from moepeft.data.batching.decoder_only import CausalCollator, check_too_long
from moepeft.data.batching.task_ids import add_task_ids, task_id
from moepeft.data.readers import READERS
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.models import check_decodes, decoder_only
from moepeft.moe.task_names import task_names
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft.prefix import placeholder_ids
from moepeft.tasks import Example

Rows = dict[str, np.ndarray]  # arrays [rows, ...]


class Collator(Protocol):
  """Makes the arrays that a model reads of a source's items."""

  tokenizer: Tokenizer
  packed: bool
  seed: int
  prefix_ids: tuple[int, ...]

  def encode(self, items: Sequence) -> list:
    """Encodes examples, and cuts encoded items, to fit a row.

    `prefix_ids` are put in front of each.
    """

  def rows(self, number: int, encoded: Sequence) -> Rows:
    """The rows of window `number`, packed if the collator packs."""

  def pack(self, encoded: Sequence, bins: Sequence[Sequence[int]]) -> Rows:
    """Rows that hold the items of each bin, in their order."""

  def pad(self, encoded: Sequence) -> Rows:
    """Rows of one encoded item each, in their order."""

  def count_cut(self, items: Sequence) -> int:
    """The number of items that are too long."""

  @property
  def length_keys(self) -> str:
    """The config keys to raise so that nothing is cut."""

  @property
  def lengths(self) -> tuple[int, ...]:
    """The length of a row, for each of its sides."""

  @property
  def max_lengths(self) -> tuple[int, ...]:
    """The part of `lengths` that one text can fill, without the prefix."""

  def resized(self, lengths: tuple[int, ...]) -> 'Collator':
    """The same collator with other `lengths`."""

  def sizes(self, encoded: Sequence) -> tuple[list[tuple[int, ...]], list[int]]:
    """(tokens of each item on each side, trained tokens of each item)."""


@dataclasses.dataclass(frozen=True)
class Seq2SeqCollator:
  """Inputs and targets, as encoder-decoders read them.

  Attributes:
    tokenizer: of the model.
    inputs_length, targets_length: of a row, EOS included.
    packed: whether rows hold several examples.
    seed: of the packed rows' order.
    prefix_ids: placeholders of a soft prompt, in front of all inputs;
      they count.
    tasks: see `batching.task_ids`.
  """

  tokenizer: Tokenizer
  inputs_length: int
  targets_length: int
  packed: bool = False
  seed: int = 0
  prefix_ids: tuple[int, ...] = ()
  tasks: tuple[str, ...] = ()

  def __post_init__(self):
    batching_packing.length_after_prefix(
      self.inputs_length, self.prefix_ids, 'config.data.inputs_length'
    )

  def encode(self, items: Sequence) -> list[packing.IdPair]:
    """Pairs of ids of examples and of pairs."""
    texts = [e for e in items if isinstance(e, Example)]
    encoded = (
      seq2seq.encode_examples(self.tokenizer, texts, *self.max_lengths)
      if texts
      else []
    )
    pairs = iter(encoded)
    return [
      self._with_prefix(*next(pairs)[:2], task_id(self.tasks, item.task))
      if isinstance(item, Example)
      else self._with_prefix(*item)
      for item in items
    ]

  def _with_prefix(
    self, x: Sequence[int], y: Sequence[int], task: int = 0
  ) -> packing.IdPair:
    """Adds the prefix; an example that was cut to a row keeps its EOS."""
    if self.prefix_ids and len(x) > self.max_lengths[0]:
      x = [*x[: self.max_lengths[0] - 1], x[-1]]
    return packing.IdPair(packing.prepend(self.prefix_ids, x), y, task)

  def rows(self, number: int, encoded: Sequence[packing.IdPair]) -> Rows:
    """See `packing.pack` and `batching.seq2seq`."""
    if not self.packed:
      return self.pad(encoded)
    rng = np.random.default_rng((self.seed, number))
    lengths = np.array(self.sizes(encoded)[0])
    return self.pack(encoded, packing.shuffled_bins(lengths, self.lengths, rng))

  def pack(
    self, encoded: Sequence[packing.IdPair], bins: Sequence[Sequence[int]]
  ) -> Rows:
    rows = packing.pack_pairs(encoded, *self.lengths, bins)
    return add_task_ids(rows, self.tasks, [e.task for e in encoded], bins)

  def pad(self, encoded: Sequence[packing.IdPair]) -> Rows:
    x, y, tasks = zip(*encoded, strict=True)
    rows = seq2seq.pad_pairs(x, y, *self.lengths)
    return add_task_ids(rows, self.tasks, tasks)

  def count_cut(self, items: Sequence) -> int:
    texts = [e for e in items if isinstance(e, Example)]
    return sum(
      seq2seq.encode_example(self.tokenizer, e, *self.max_lengths)[2]
      for e in texts
    )

  @property
  def length_keys(self) -> str:
    return 'config.data.inputs_length or config.data.targets_length'

  @property
  def lengths(self) -> tuple[int, int]:
    return self.inputs_length, self.targets_length

  @property
  def max_lengths(self) -> tuple[int, int]:
    return self.inputs_length - len(self.prefix_ids), self.targets_length

  def resized(self, lengths: tuple[int, int]) -> 'Seq2SeqCollator':
    return dataclasses.replace(
      self, inputs_length=lengths[0], targets_length=lengths[1]
    )

  def sizes(
    self, encoded: Sequence[packing.IdPair]
  ) -> tuple[list[tuple[int, int]], list[int]]:
    lengths = [(len(pair.inputs), len(pair.targets)) for pair in encoded]
    return lengths, [len(pair.targets) for pair in encoded]


def make_model_collator(
  data: ConfigDict,
  tokenizer: Tokenizer,
  model: Any,
  seed: int,
  adapter_map: AdapterMap | None = None,
) -> Collator:
  """The collator of a model, with the lengths of config.data.

  Args:
    model: a model or its config; None for an encoder-decoder's batches.
    adapter_map: of the model's method, which may put a prefix before each text
      (`moepeft.peft.prefix`) and read the task of an example
      (`moepeft.moe.task_names`).

  Raises:
    ValueError: config.data.truncation is none that there is, or nothing that
      this model's batches look at, or the model has no decoder.
  """
  prefix_ids, tasks = (), ()
  if adapter_map is not None:
    vocab = getattr(model, 'config', model).vocab
    prefix_ids = placeholder_ids(adapter_map, vocab)
    tasks = task_names(adapter_map)
  if model is not None:
    check_decodes(model)
  if model is not None and decoder_only(model):
    return CausalCollator(
      tokenizer,
      data.length,
      data.truncation,
      data.packing,
      seed,
      prefix_ids,
      tasks,
    )
  check_too_long(data.truncation)
  is_single = 'single' in READERS.lookup(data.source).batches
  if data.truncation != 'prompt' and is_single:
    raise ValueError(
      f'config.data.truncation={data.truncation!r} does nothing with an '
      f'encoder-decoder and config.data.source={data.source!r}, whose inputs '
      "and targets are each cut at their end; set it to 'prompt'"
    )
  lengths = data.inputs_length, data.targets_length
  return Seq2SeqCollator(
    tokenizer, *lengths, data.packing, seed, prefix_ids, tasks
  )


def scoring_lengths(data: ConfigDict, model: Any) -> tuple[int, int]:
  """The most tokens of the inputs and of a choice in scoring.

  In a decoder they share a row: a choice has config.data.targets_length of
  it, at most half, and the prompt the rest.
  """
  if not decoder_only(model):
    return data.inputs_length, data.targets_length
  targets = min(data.targets_length, data.length // 2)
  return data.length - targets, targets
