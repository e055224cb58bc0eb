# SPDX-License-Identifier: Apache-2.0
"""Rows of decoder-only models: one text, of which some tokens are trained."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moepeft.data.batching import packing
from moepeft.data.batching import packing as batching_packing
from moepeft.data.batching.seq2seq import PAD
from moepeft.data.batching.task_ids import add_task_ids, task_id
from moepeft.data.tokenizers.tokenizer import Tokenizer, require_eos
from moepeft.tasks import Example

TOO_LONG = ('prompt', 'end', 'drop')
# Between the inputs and the targets of an example.
SEPARATOR = '\n'


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """A text as ids.

  Attributes:
    ids: int32 [n], the whole text.
    loss_mask: bool [n], True on the tokens that are trained as targets. The
      first token follows nothing, so it never is.
    cut: whether it was longer and was cut.
    task: 1.. for each of the collator's tasks, 0 where it has none.
  """

  ids: np.ndarray
  loss_mask: np.ndarray
  cut: bool = False
  task: int = 0

  @property
  def has_targets(self) -> bool:
    """Whether there is a token to train."""
    return bool(self.loss_mask[1:].any())


def check_too_long(too_long: str) -> None:
  """Raises ValueError where it is none of TOO_LONG."""
  if too_long not in TOO_LONG:
    raise ValueError(
      f'config.data.truncation is one of {", ".join(TOO_LONG)}; got '
      f'{too_long!r}'
    )


def make_sample(
  prompt: Sequence[int], answer: Sequence[int], task: int = 0
) -> Sample:
  """A prompt and an answer as one sample, of which the answer is trained."""
  ids = np.concatenate([np.asarray(x, np.int32) for x in (prompt, answer)])
  return Sample(ids, np.arange(len(ids)) >= len(prompt), task=task)


def encode_prompts(
  tokenizer: Tokenizer, texts: Sequence[str]
) -> list[list[int]]:
  """Inputs as ids: BOS if the tokenizer has one, the text, a newline."""
  start = [] if tokenizer.bos is None else [tokenizer.bos]
  ended = [text + SEPARATOR for text in texts]
  return (
    [start + list(ids) for ids in tokenizer.encode_all(ended)] if ended else []
  )


def encode_answers(
  tokenizer: Tokenizer, texts: Sequence[str]
) -> list[list[int]]:
  """Targets as ids, with EOS."""
  encoded = tokenizer.encode_all(texts) if texts else []
  end = require_eos(tokenizer) if texts else None
  return [[*ids, end] for ids in encoded]


def keep_last(ids: np.ndarray, most: int, bos: int | None) -> np.ndarray:
  """The last ids, at most `most` of them (1 at least).

  Args:
    bos: what texts begin with, if anything; where they do, it stays.
  """
  if len(ids) <= most:
    return ids
  if bos is None or ids[0] != bos:
    return ids[len(ids) - most :]
  return np.concatenate([ids[:1], ids[len(ids) - most + 1 :]])


def truncate(
  sample: Sample, most: int, too_long: str, bos: int | None = None
) -> Sample | None:
  """A sample of at most so many ids.

  Args:
    bos: what texts begin with, if anything.
    too_long: 'prompt' drops the beginning of what stands before the first
      trained token, `bos` aside, and then the answer's end; 'end' drops the
      end; 'drop' all of it.

  Returns:
    None where nothing is left to train.
  """
  over = len(sample.ids) - most
  if over > 0:
    if too_long == 'drop':
      return None
    first = int(np.argmax(sample.loss_mask)) if too_long == 'prompt' else 0
    # One token before it, so that the first trained token follows one.
    dropped = min(over, max(first - 1, 0))
    # Of these the first may be what begins texts.
    head = int(dropped > 0 and bos is not None and sample.ids[0] == bos)
    places = np.arange(dropped, dropped + most)
    places[:head] = 0
    ids, loss_mask = sample.ids[places], sample.loss_mask[places]
    sample = dataclasses.replace(sample, ids=ids, loss_mask=loss_mask, cut=True)
  return sample if sample.has_targets else None


def prepend_prefix(prefix_ids: Sequence[int], sample: Sample) -> Sample:
  """A sample behind placeholders: the same of its tokens are trained."""
  if not prefix_ids:
    return sample
  loss_mask = np.pad(sample.loss_mask, (len(prefix_ids), 0))
  loss_mask[len(prefix_ids)] = False
  ids = batching_packing.prepend(prefix_ids, sample.ids)
  return dataclasses.replace(sample, ids=ids, loss_mask=loss_mask)


def pad_samples(
  samples: Sequence[Sample], length: int
) -> dict[str, np.ndarray]:
  """Rows of one sample each.

  Returns:
    inputs, targets (the token that follows each) int32 [b, t], inputs_mask
    (real tokens) and targets_mask (trained ones) bool [b, t].
  """
  inputs, targets = np.full((2, len(samples), length), PAD, np.int32)
  real, trained = np.zeros((2, len(samples), length), bool)
  for row, sample in enumerate(samples):
    n = len(sample.ids) - 1
    inputs[row, :n], targets[row, :n] = sample.ids[:-1], sample.ids[1:]
    real[row, :n], trained[row, :n] = True, sample.loss_mask[1:]
  return {
    'inputs': inputs,
    'targets': targets,
    'inputs_mask': real,
    'targets_mask': trained,
  }


def pack_samples(
  samples: Sequence[Sample], length: int, bins: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
  """Rows that hold several samples each.

  Args:
    bins: the samples of each row, that fit.

  Returns:
    As `padded`, and int32 [b, t] inputs_segments and targets_segments (1, 2,
    ... in the order of a row's samples, 0 on padding) and inputs_positions
    (from 0 in each).
  """
  whole = pad_samples(samples, length)
  rows = {k: np.zeros((len(bins), length), v.dtype) for k, v in whole.items()}
  segments, positions = np.zeros((2, len(bins), length), np.int32)
  for row, items in enumerate(bins):
    at = 0
    for segment, item in enumerate(items, 1):
      n = len(samples[item].ids) - 1
      for key, array in rows.items():
        array[row, at : at + n] = whole[key][item, :n]
      segments[row, at : at + n] = segment
      positions[row, at : at + n] = np.arange(n)
      at += n
  return rows | {
    'inputs_segments': segments,
    'targets_segments': segments,
    'inputs_positions': positions,
  }


@dataclasses.dataclass(frozen=True)
class CausalCollator:
  """The collator of decoder-only models; see `collators.Collator`.

  Attributes:
    tokenizer: of the model.
    length: tokens of a row, that is, fed: a sample has one more.
    too_long: see `shortened`.
    packed: whether rows hold several samples.
    seed: of the packed rows' order.
    prefix_ids: placeholders of a soft prompt, in front of all texts; they
      count, and none is trained, nor the token that follows them.
    tasks: see `batching.task_ids`.
  """

  tokenizer: Tokenizer
  length: int
  too_long: str = 'prompt'
  packed: bool = False
  seed: int = 0
  prefix_ids: tuple[int, ...] = ()
  tasks: tuple[str, ...] = ()

  def __post_init__(self):
    check_too_long(self.too_long)
    batching_packing.length_after_prefix(
      self.length, self.prefix_ids, 'config.data.length'
    )

  def encode(self, items: Sequence) -> list[Sample]:
    """Samples that fit of examples, samples, and pairs of ids.

    Raises:
      ValueError: none of them leaves a token to train.
    """
    most = self.max_lengths[0] + 1
    short = (
      truncate(sample, most, self.too_long, self.tokenizer.bos)
      for sample in self.encode_uncut(items)
    )
    samples = [
      prepend_prefix(self.prefix_ids, sample)
      for sample in short
      if sample is not None
    ]
    if items and not samples:
      raise ValueError(
        f'none of {len(items)} examples has a token to train in '
        f'config.data.length={self.length} with config.data.truncation='
        f'{self.too_long!r}; raise the length'
      )
    return samples

  def encode_uncut(self, items: Sequence) -> list[Sample]:
    """Samples of any length, in the order of the items."""
    texts = [e for e in items if isinstance(e, Example)]
    encoded_texts = iter(
      zip(
        encode_prompts(self.tokenizer, [e.inputs for e in texts]),
        encode_answers(self.tokenizer, [e.targets for e in texts]),
        strict=True,
      )
    )
    samples = []
    for item in items:
      if isinstance(item, Sample):
        samples.append(item)
      else:
        is_text = isinstance(item, Example)
        pair = next(encoded_texts) if is_text else item
        task = task_id(self.tasks, item.task) if is_text else 0
        samples.append(make_sample(*pair, task))
    return samples

  def rows(self, number: int, encoded: Sequence[Sample]):
    """A window's rows: see `packed` and `padded`."""
    if not self.packed:
      return self.pad(encoded)
    rng = np.random.default_rng((self.seed, number))
    lengths = np.array(self.sizes(encoded)[0])
    return self.pack(encoded, packing.shuffled_bins(lengths, self.lengths, rng))

  def pack(self, encoded: Sequence[Sample], bins: Sequence[Sequence[int]]):
    rows = pack_samples(encoded, self.length, bins)
    return add_task_ids(rows, self.tasks, [e.task for e in encoded], bins)

  def pad(self, encoded: Sequence[Sample]) -> dict[str, np.ndarray]:
    rows = pad_samples(encoded, self.length)
    return add_task_ids(rows, self.tasks, [e.task for e in encoded])

  def count_cut(self, items: Sequence) -> int:
    """The number of items that are too long."""
    most = self.max_lengths[0] + 1
    return sum(len(s.ids) > most or s.cut for s in self.encode_uncut(items))

  @property
  def length_keys(self) -> str:
    """The config key to raise so that nothing is cut."""
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
    """(tokens fed, trained tokens) of each."""
    trained = [int(sample.loss_mask[1:].sum()) for sample in encoded]
    return [(len(sample.ids) - 1,) for sample in encoded], trained
