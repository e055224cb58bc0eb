# SPDX-License-Identifier: Apache-2.0
"""Rows of decoder-only models: texts with a loss mask."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moepeft.data.batching import packing
from moepeft.data.batching.router_inputs import (
  NO_INPUTS,
  ExampleInputs,
  RouterInputs,
)
from moepeft.data.batching.seq2seq import PAD
from moepeft.data.tokenizers.tokenizer import Tokenizer, require_eos
from moepeft.tasks import Example

TRUNCATIONS = ('prompt', 'end', 'drop')
# Between the inputs and the targets of an example.
SEPARATOR = '\n'


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """A tokenized text and its loss mask.

  Attributes:
    ids: int32 [n], the whole text.
    loss_mask: bool [n], True on the tokens that are targets. The first entry
      has no effect, as no token precedes it.
    cut: whether the text was truncated.
    routed_by: what routers read of the example.
  """

  ids: np.ndarray
  loss_mask: np.ndarray
  cut: bool = False
  routed_by: ExampleInputs = NO_INPUTS

  @property
  def has_targets(self) -> bool:
    """Whether the loss is on any token."""
    return bool(self.loss_mask[1:].any())


def check_truncation(truncation: str) -> None:
  """Raises ValueError if `truncation` is not one of TRUNCATIONS."""
  if truncation not in TRUNCATIONS:
    raise ValueError(
      f'config.data.truncation is one of {", ".join(TRUNCATIONS)}; got '
      f'{truncation!r}'
    )


def make_sample(
  prompt: Sequence[int],
  answer: Sequence[int],
  routed_by: ExampleInputs = NO_INPUTS,
) -> Sample:
  """A sample of a prompt and an answer, with the loss on the answer."""
  ids = np.concatenate([np.asarray(x, np.int32) for x in (prompt, answer)])
  loss_mask = np.arange(len(ids)) >= len(prompt)
  return Sample(ids, loss_mask, routed_by=routed_by)


def encode_prompts(
  tokenizer: Tokenizer, texts: Sequence[str]
) -> list[list[int]]:
  """Encodes inputs: BOS if the tokenizer has one, the text, a newline."""
  if not texts:
    return []
  bos = [] if tokenizer.bos is None else [tokenizer.bos]
  encoded = tokenizer.encode_all([text + SEPARATOR for text in texts])
  return [bos + list(ids) for ids in encoded]


def encode_answers(
  tokenizer: Tokenizer, texts: Sequence[str]
) -> list[list[int]]:
  """Encodes targets, each followed by EOS."""
  if not texts:
    return []
  eos = require_eos(tokenizer)
  return [[*ids, eos] for ids in tokenizer.encode_all(texts)]


def keep_last(ids: np.ndarray, max_length: int, bos: int | None) -> np.ndarray:
  """Truncates ids on the left to `max_length` (at least 1) of them.

  Args:
    bos: the tokenizer's BOS, which is kept if the ids start with it.
  """
  if len(ids) <= max_length:
    return ids
  if bos is None or ids[0] != bos:
    return ids[len(ids) - max_length :]
  return np.concatenate([ids[:1], ids[len(ids) - max_length + 1 :]])


def truncate(
  sample: Sample, max_length: int, truncation: str, bos: int | None = None
) -> Sample | None:
  """Truncates a sample to `max_length` ids.

  Args:
    truncation: 'prompt' drops the beginning of the tokens before the first
      target, except BOS, and then the answer's end; 'end' drops the sample's
      end; 'drop' drops the whole sample.
    bos: the tokenizer's BOS, if it has one.

  Returns:
    None if no target is left.
  """
  excess = len(sample.ids) - max_length
  if excess > 0:
    if truncation == 'drop':
      return None
    first = int(np.argmax(sample.loss_mask)) if truncation == 'prompt' else 0
    # One token stays before the first target, which is predicted from it.
    dropped = min(excess, max(first - 1, 0))
    indices = np.arange(dropped, dropped + max_length)
    if dropped > 0 and bos is not None and sample.ids[0] == bos:
      indices[0] = 0
    ids, loss_mask = sample.ids[indices], sample.loss_mask[indices]
    sample = dataclasses.replace(sample, ids=ids, loss_mask=loss_mask, cut=True)
  return sample if sample.has_targets else None


def prepend_prefix(prefix_ids: Sequence[int], sample: Sample) -> Sample:
  """Puts placeholders before a sample, without a loss on them.

  The sample's first token, which the last placeholder precedes, has no loss
  either.
  """
  if not prefix_ids:
    return sample
  loss_mask = np.pad(sample.loss_mask, (len(prefix_ids), 0))
  loss_mask[len(prefix_ids)] = False
  ids = packing.prepend_prefix(prefix_ids, sample.ids)
  return dataclasses.replace(sample, ids=ids, loss_mask=loss_mask)


def pad_samples(
  samples: Sequence[Sample], length: int
) -> dict[str, np.ndarray]:
  """Rows of one sample each.

  Returns:
    inputs and targets, the next token of each input, int32 [b, t];
    inputs_mask, True except on padding, and targets_mask, True where the loss
    is, bool [b, t].
  """
  inputs, targets = np.full((2, len(samples), length), PAD, np.int32)
  inputs_mask, targets_mask = np.zeros((2, len(samples), length), bool)
  for row, sample in enumerate(samples):
    n = len(sample.ids) - 1
    inputs[row, :n], targets[row, :n] = sample.ids[:-1], sample.ids[1:]
    inputs_mask[row, :n], targets_mask[row, :n] = True, sample.loss_mask[1:]
  return {
    'inputs': inputs,
    'targets': targets,
    'inputs_mask': inputs_mask,
    'targets_mask': targets_mask,
  }


def pack_samples(
  samples: Sequence[Sample], length: int, bins: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
  """Rows that hold several samples each.

  Args:
    bins: indices of each row's samples, which fit into it.

  Returns:
    The arrays of `pad_samples`, and int32 [b, t] inputs_segments and
    targets_segments (1, 2, ... in the order of a row's samples, 0 on padding)
    and inputs_positions (from 0 in each segment).
  """
  padded = pad_samples(samples, length)
  rows = {k: np.zeros((len(bins), length), v.dtype) for k, v in padded.items()}
  segments, positions = np.zeros((2, len(bins), length), np.int32)
  for row, items in enumerate(bins):
    start = 0
    for segment, item in enumerate(items, 1):
      n = len(samples[item].ids) - 1
      for key, array in rows.items():
        array[row, start : start + n] = padded[key][item, :n]
      segments[row, start : start + n] = segment
      positions[row, start : start + n] = np.arange(n)
      start += n
  return rows | {
    'inputs_segments': segments,
    'targets_segments': segments,
    'inputs_positions': positions,
  }


@dataclasses.dataclass(frozen=True)
class CausalCollator:
  """The collator of decoder-only models; see `collators.Collator`.

  Attributes:
    tokenizer: the model's tokenizer.
    length: input tokens of a row; the last token of a sample is only a target,
      so a sample may have one token more.
    truncation: see `truncate`.
    packed: whether rows hold several samples.
    seed: of the packed rows' order.
    prefix_ids: placeholders of a soft prompt before all texts, which count
      towards `length`; see `prepend_prefix`.
    router_inputs: what the method's routers read of examples.
  """

  tokenizer: Tokenizer
  length: int
  truncation: str = 'prompt'
  packed: bool = False
  seed: int = 0
  prefix_ids: tuple[int, ...] = ()
  router_inputs: RouterInputs = RouterInputs()

  def __post_init__(self):
    check_truncation(self.truncation)
    packing.length_after_prefix(
      self.length, self.prefix_ids, 'config.data.length'
    )

  def encode(self, items: Sequence) -> list[Sample]:
    """Encodes and truncates examples, samples and pairs of ids.

    Items without a target after truncation are left out.

    Raises:
      ValueError: all of them are left out.
    """
    max_length = self.max_lengths[0] + 1
    truncated = (
      truncate(sample, max_length, self.truncation, self.tokenizer.bos)
      for sample in self.encode_uncut(items)
    )
    samples = [
      prepend_prefix(self.prefix_ids, sample)
      for sample in truncated
      if sample is not None
    ]
    if items and not samples:
      raise ValueError(
        f'none of {len(items)} examples has a token to train in '
        f'config.data.length={self.length} with config.data.truncation='
        f'{self.truncation!r}; raise the length'
      )
    return samples

  def encode_uncut(self, items: Sequence) -> list[Sample]:
    """Encodes items without truncation."""
    examples = [e for e in items if isinstance(e, Example)]
    encoded_examples = iter(
      zip(
        encode_prompts(self.tokenizer, [e.inputs for e in examples]),
        encode_answers(self.tokenizer, [e.targets for e in examples]),
        strict=True,
      )
    )
    samples = []
    for item in items:
      if isinstance(item, Sample):
        samples.append(item)
      else:
        is_example = isinstance(item, Example)
        pair = next(encoded_examples) if is_example else item
        read = (self.router_inputs.of_example(item),) if is_example else ()
        samples.append(make_sample(*pair, *read))
    return samples

  def rows(self, window: int, encoded: Sequence[Sample]):
    """Rows as of `pack_samples` or `pad_samples`."""
    if not self.packed:
      return self.pad(encoded)
    rng = np.random.default_rng((self.seed, window))
    lengths = np.array(self.sizes(encoded)[0])
    sizes = self.router_inputs.with_counts(lengths, self.lengths)
    return self.pack(encoded, packing.shuffled_bins(*sizes, rng))

  def pack(self, encoded: Sequence[Sample], bins: Sequence[Sequence[int]]):
    rows = pack_samples(encoded, self.length, bins)
    return self.router_inputs.add(rows, [e.routed_by for e in encoded], bins)

  def pad(self, encoded: Sequence[Sample]) -> dict[str, np.ndarray]:
    rows = pad_samples(encoded, self.length)
    return self.router_inputs.add(rows, [e.routed_by for e in encoded])

  def count_truncated(self, items: Sequence) -> int:
    max_length = self.max_lengths[0] + 1
    return sum(
      len(sample.ids) > max_length or sample.cut
      for sample in self.encode_uncut(items)
    )

  @property
  def length_keys(self) -> str:
    return 'config.data.length'

  @property
  def lengths(self) -> tuple[int]:
    return (self.length,)

  @property
  def max_lengths(self) -> tuple[int]:
    return (self.length - len(self.prefix_ids),)

  def resized(self, lengths: tuple[int]) -> 'CausalCollator':
    return dataclasses.replace(self, length=lengths[0])

  def sizes(
    self, encoded: Sequence[Sample]
  ) -> tuple[list[tuple[int]], list[int]]:
    num_targets = [int(sample.loss_mask[1:].sum()) for sample in encoded]
    return [(len(sample.ids) - 1,) for sample in encoded], num_targets
