# SPDX-License-Identifier: Apache-2.0
"""Collators: batches of examples for encoder-decoders and decoders."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from moepeft.data.batching import packing, seq2seq
from moepeft.data.batching.decoder_only import CausalCollator, check_truncation
from moepeft.data.batching.router_inputs import (
  NO_INPUTS,
  ExampleInputs,
  RouterInputs,
)
from moepeft.data.readers import READERS
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.models import check_decodes, decoder_only
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft.prefix import placeholder_ids
from moepeft.tasks import Example

Rows = dict[str, np.ndarray]  # arrays [rows, ...]


class Collator(Protocol):
  """Makes a model's batches of a source's items."""

  tokenizer: Tokenizer
  packed: bool
  seed: int
  prefix_ids: tuple[int, ...]

  def encode(self, items: Sequence) -> list:
    """Encodes examples, and truncates items that are encoded already.

    Each result fits a row and starts with `prefix_ids`.
    """

  def rows(self, window: int, encoded: Sequence) -> Rows:
    """The rows of a window, packed if the collator packs.

    Args:
      window: its index, which seeds the order of packed rows.
    """

  def pack(self, encoded: Sequence, bins: Sequence[Sequence[int]]) -> Rows:
    """One row for each bin, of the items with the indices in it."""

  def pad(self, encoded: Sequence) -> Rows:
    """One row for each encoded item."""

  def count_truncated(self, items: Sequence) -> int:
    """The number of items that `encode` truncates."""

  @property
  def length_keys(self) -> str:
    """The config keys to raise so that nothing is truncated, for messages."""

  @property
  def lengths(self) -> tuple[int, ...]:
    """The length of a row: (inputs, targets), or (length,) of a decoder."""

  @property
  def max_lengths(self) -> tuple[int, ...]:
    """`lengths` without the prefix: the most tokens of a text."""

  def resized(self, lengths: tuple[int, ...]) -> 'Collator':
    """The same collator with other `lengths`."""

  def sizes(self, encoded: Sequence) -> tuple[list[tuple[int, ...]], list[int]]:
    """(lengths of each item, as in `lengths`; target tokens of each item)."""


@dataclasses.dataclass(frozen=True)
class Seq2SeqCollator:
  """Makes batches of inputs and targets for encoder-decoders.

  Attributes:
    tokenizer: the model's tokenizer.
    inputs_length, targets_length: tokens of a row, EOS included.
    packed: whether rows hold several examples.
    seed: of the packed rows' order.
    prefix_ids: placeholders of a soft prompt before all inputs, which count
      towards inputs_length.
    router_inputs: what the method's routers read of examples.
  """

  tokenizer: Tokenizer
  inputs_length: int
  targets_length: int
  packed: bool = False
  seed: int = 0
  prefix_ids: tuple[int, ...] = ()
  router_inputs: RouterInputs = RouterInputs()

  def __post_init__(self):
    packing.length_after_prefix(
      self.inputs_length, self.prefix_ids, 'config.data.inputs_length'
    )

  def encode(self, items: Sequence) -> list[packing.TokenizedPair]:
    """Encodes `Example`s and adds the prefix to them and to pairs of ids."""
    examples = [e for e in items if isinstance(e, Example)]
    pairs = iter(
      seq2seq.encode_examples(self.tokenizer, examples, *self.max_lengths)
      if examples
      else []
    )
    return [
      self._with_prefix(*next(pairs)[:2], self.router_inputs.of_example(item))
      if isinstance(item, Example)
      else self._with_prefix(*item)
      for item in items
    ]

  def _with_prefix(
    self,
    x: Sequence[int],
    y: Sequence[int],
    routed_by: ExampleInputs = NO_INPUTS,
  ) -> packing.TokenizedPair:
    """Adds the prefix; inputs that are truncated for it keep their EOS."""
    if self.prefix_ids and len(x) > self.max_lengths[0]:
      x = [*x[: self.max_lengths[0] - 1], x[-1]]
    return packing.TokenizedPair(
      packing.prepend_prefix(self.prefix_ids, x), y, routed_by
    )

  def rows(self, window: int, encoded: Sequence[packing.TokenizedPair]) -> Rows:
    """Rows as of `packing.pack_pairs` or `seq2seq.pad_pairs`."""
    if not self.packed:
      return self.pad(encoded)
    rng = np.random.default_rng((self.seed, window))
    lengths = np.array(self.sizes(encoded)[0])
    sizes = self.router_inputs.with_counts(lengths, self.lengths)
    return self.pack(encoded, packing.shuffled_bins(*sizes, rng))

  def pack(
    self,
    encoded: Sequence[packing.TokenizedPair],
    bins: Sequence[Sequence[int]],
  ) -> Rows:
    rows = packing.pack_pairs(encoded, *self.lengths, bins)
    return self.router_inputs.add(rows, [e.routed_by for e in encoded], bins)

  def pad(self, encoded: Sequence[packing.TokenizedPair]) -> Rows:
    x, y, routed_by = zip(*encoded, strict=True)
    rows = seq2seq.pad_pairs(x, y, *self.lengths)
    return self.router_inputs.add(rows, routed_by)

  def count_truncated(self, items: Sequence) -> int:
    return sum(
      seq2seq.encode_example(self.tokenizer, e, *self.max_lengths)[2]
      for e in items
      if isinstance(e, Example)
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
    self, encoded: Sequence[packing.TokenizedPair]
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
  """Makes the collator of a model, with the lengths of config.data.

  Args:
    model: a model or its config; None for an encoder-decoder's batches.
    adapter_map: the model's method. It may have a soft prompt
      (`moepeft.peft.prefix`) or routers that read more of an example than
      its tokens (`RouterInputs`).

  Raises:
    ValueError: config.data.truncation is unknown, or has no effect on this
      model's batches, or the model has no decoder.
  """
  prefix_ids, router_inputs = (), RouterInputs()
  if adapter_map is not None:
    vocab = getattr(model, 'config', model).vocab
    prefix_ids = placeholder_ids(adapter_map, vocab)
    router_inputs = RouterInputs.of_method(adapter_map)
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
      router_inputs,
    )
  check_truncation(data.truncation)
  is_single = 'single' in READERS.lookup(data.source).batches
  if data.truncation != 'prompt' and is_single:
    raise ValueError(
      f'config.data.truncation={data.truncation!r} does nothing with an '
      f'encoder-decoder and config.data.source={data.source!r}, whose inputs '
      "and targets are each cut at their end; set it to 'prompt'"
    )
  lengths = data.inputs_length, data.targets_length
  return Seq2SeqCollator(
    tokenizer, *lengths, data.packing, seed, prefix_ids, router_inputs
  )


def scoring_lengths(data: ConfigDict, model: Any) -> tuple[int, int]:
  """Maximum tokens of (the inputs, a choice) when choices are scored.

  A decoder's row holds both: a choice has config.data.targets_length tokens,
  at most half of the row, and the inputs have the rest.
  """
  if not decoder_only(model):
    return data.inputs_length, data.targets_length
  targets = min(data.targets_length, data.length // 2)
  return data.length - targets, targets
