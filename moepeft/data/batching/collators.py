# SPDX-License-Identifier: Apache-2.0
"""The forms of batches: of encoder-decoders and of decoder-only models."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from moepeft.data.batching import packing, seq2seq
from moepeft.data.batching import packing as batching_packing
from moepeft.data.batching.decoder_only import Samples, check_too_long
from moepeft.data.tokenizers.tokenizer import Vocabulary
from moepeft.models import check_decodes, decoder_only
from moepeft.tasks import Example

Rows = dict[str, np.ndarray]  # arrays [rows, ...]


class Form(Protocol):
  """From what sources give to the arrays that a model reads."""

  words: Vocabulary
  packed: bool
  seed: int
  before: tuple[int, ...]

  def encode(self, items: Sequence) -> list:
    """Examples, and what is ids already, as ids that fit a row, `before` in
    front of each."""

  def rows(self, number: int, encoded: Sequence) -> Rows:
    """The rows of window `number`, packed where the form is."""

  def laid(self, encoded: Sequence, bins: Sequence[Sequence[int]]) -> Rows:
    """Rows that hold the items of each bin, in their order."""

  def padded(self, encoded: Sequence) -> Rows:
    """Rows of one encoded item each, in their order."""

  def cut(self, items: Sequence) -> int:
    """How many of them are too long."""

  @property
  def longer(self) -> str:
    """What to raise so that nothing is cut."""

  @property
  def lengths(self) -> tuple[int, ...]:
    """Of a row, of each of its sides."""

  @property
  def rooms(self) -> tuple[int, ...]:
    """What of `lengths` one text can fill."""

  def resized(self, lengths: tuple[int, ...]) -> 'Form':
    """The same with other `lengths`."""

  def sizes(self, encoded: Sequence) -> tuple[list[tuple[int, ...]], list[int]]:
    """(what of `lengths` each item fills, its trained tokens)."""


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Inputs and targets, as encoder-decoders read them.

  Attributes:
    words: the vocabulary.
    inputs_length, targets_length: of a row, EOS included.
    packed: whether rows hold several examples.
    seed: of the packed rows' order.
    before: placeholders of a soft prompt, in front of all inputs; they count.
  """

  words: Vocabulary
  inputs_length: int
  targets_length: int
  packed: bool = False
  seed: int = 0
  before: tuple[int, ...] = ()

  def __post_init__(self):
    batching_packing.room(
      self.inputs_length, self.before, 'config.data.inputs_length'
    )

  def encode(self, items: Sequence) -> list[packing.Pair]:
    """Pairs of ids of examples, and of what is a pair already."""
    texts = [e for e in items if isinstance(e, Example)]
    made = seq2seq.encode_all(self.words, texts, *self.rooms) if texts else []
    pairs = iter(made)
    every = [next(pairs) if isinstance(e, Example) else e for e in items]
    return [self._behind(x, y) for x, y in every] if self.before else every

  def _behind(self, x: Sequence[int], y: Sequence[int]) -> packing.Pair:
    """What was cut to a row, like SeqIO's, keeps its EOS."""
    if len(x) > self.rooms[0]:
      x = [*x[: self.rooms[0] - 1], x[-1]]
    return batching_packing.put(self.before, x), y

  def rows(self, number: int, encoded: Sequence[packing.Pair]) -> Rows:
    """See `packing.pack` and `batching.seq2seq`."""
    if not self.packed:
      return self.padded(encoded)
    rng = np.random.default_rng((self.seed, number))
    lengths = np.array(self.sizes(encoded)[0])
    return self.laid(encoded, packing.shuffled(lengths, self.lengths, rng))

  def laid(
    self, encoded: Sequence[packing.Pair], bins: Sequence[Sequence[int]]
  ) -> Rows:
    return packing.pack(encoded, *self.lengths, bins)

  def padded(self, encoded: Sequence[packing.Pair]) -> Rows:
    x, y = zip(*encoded, strict=True)
    return seq2seq.seq2seq(x, y, *self.lengths)

  def cut(self, items: Sequence) -> int:
    texts = [e for e in items if isinstance(e, Example)]
    return sum(seq2seq.encode(self.words, e, *self.rooms)[2] for e in texts)

  @property
  def longer(self) -> str:
    return 'config.data.inputs_length or config.data.targets_length'

  @property
  def lengths(self) -> tuple[int, int]:
    return self.inputs_length, self.targets_length

  @property
  def rooms(self) -> tuple[int, int]:
    return self.inputs_length - len(self.before), self.targets_length

  def resized(self, lengths: tuple[int, int]) -> 'Pairs':
    return dataclasses.replace(
      self, inputs_length=lengths[0], targets_length=lengths[1]
    )

  def sizes(
    self, encoded: Sequence[packing.Pair]
  ) -> tuple[list[tuple[int, int]], list[int]]:
    return [(len(x), len(y)) for x, y in encoded], [len(y) for _, y in encoded]


def form(
  data: ConfigDict,
  words: Vocabulary,
  model: Any,
  seed: int,
  before: tuple[int, ...] = (),
) -> Form:
  """The form that a model reads, with the lengths of config.data.

  Args:
    model: a model or its config.
    before: of `moepeft.peft.methods.prompt_tuning`, of the model's method.

  Raises:
    ValueError: config.data.too_long is none that there is, or nothing that
      this model's batches look at, or the model has no decoder.
  """
  check_decodes(model)
  if decoder_only(model):
    return Samples(
      words, data.length, data.too_long, data.packing, seed, before
    )
  check_too_long(data.too_long)
  if data.too_long != 'prompt' and data.source != 'preference':
    raise ValueError(
      f'config.data.too_long={data.too_long!r} does nothing with an '
      f'encoder-decoder and config.data.source={data.source!r}, whose inputs '
      "and targets are each cut at their end; set it to 'prompt'"
    )
  lengths = data.inputs_length, data.targets_length
  return Pairs(words, *lengths, data.packing, seed, before)


def scored_lengths(data: ConfigDict, model: Any) -> tuple[int, int]:
  """The most tokens of the inputs and of a choice in scoring.

  In a decoder they share a row: a choice has config.data.targets_length of
  it, at most half, and the prompt the rest.
  """
  if not decoder_only(model):
    return data.inputs_length, data.targets_length
  targets = min(data.targets_length, data.length // 2)
  return data.length - targets, targets
