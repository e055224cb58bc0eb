# SPDX-License-Identifier: Apache-2.0
"""Rows of decoder-only models: one text, of which some tokens are trained."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moepeft.data.batching import packing
from moepeft.data.batching import packing as batching_packing
from moepeft.data.batching.seq2seq import PAD
from moepeft.data.tokenizers.tokenizer import Vocabulary, eos_of
from moepeft.tasks import Example

TOO_LONG = ('prompt', 'end', 'drop')
# Between the inputs and the targets of an example.
SEPARATOR = '\n'


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """A text as ids.

  Attributes:
    ids: int32 [n], the whole text.
    trained: bool [n], True on the tokens that are trained as targets. The
      first token follows nothing, so it never is.
    cut: whether it was longer and was cut.
  """

  ids: np.ndarray
  trained: np.ndarray
  cut: bool = False

  @property
  def teaches(self) -> bool:
    """Whether there is a token to train."""
    return bool(self.trained[1:].any())


def check_too_long(too_long: str) -> None:
  """Raises ValueError where it is none of TOO_LONG."""
  if too_long not in TOO_LONG:
    raise ValueError(
      f'config.data.too_long is one of {", ".join(TOO_LONG)}; got {too_long!r}'
    )


def sample(prompt: Sequence[int], answer: Sequence[int]) -> Sample:
  """Of which the answer is trained."""
  ids = np.concatenate([np.asarray(x, np.int32) for x in (prompt, answer)])
  return Sample(ids, np.arange(len(ids)) >= len(prompt))


def prompts(words: Vocabulary, texts: Sequence[str]) -> list[list[int]]:
  """Inputs as ids: what the tokenizer begins texts with, and a line's end."""
  start = [] if words.bos is None else [words.bos]
  ended = [text + SEPARATOR for text in texts]
  return [start + list(ids) for ids in words.encode_all(ended)] if ended else []


def answers(words: Vocabulary, texts: Sequence[str]) -> list[list[int]]:
  """Targets as ids, with EOS."""
  found = words.encode_all(texts) if texts else []
  end = eos_of(words) if texts else None
  return [[*ids, end] for ids in found]


def last(ids: np.ndarray, most: int, bos: int | None) -> np.ndarray:
  """The last ids, at most so many (1 at least).

  Args:
    bos: what texts begin with, if anything; where they do, it stays.
  """
  if len(ids) <= most:
    return ids
  if bos is None or ids[0] != bos:
    return ids[len(ids) - most :]
  return np.concatenate([ids[:1], ids[len(ids) - most + 1 :]])


def shortened(
  found: Sample, most: int, too_long: str, bos: int | None = None
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
  over = len(found.ids) - most
  if over > 0:
    if too_long == 'drop':
      return None
    first = int(np.argmax(found.trained)) if too_long == 'prompt' else 0
    # One token before it, so that the first trained token follows one.
    gone = min(over, max(first - 1, 0))
    # Of these the first may be what begins texts.
    head = int(gone > 0 and bos is not None and found.ids[0] == bos)
    places = np.arange(gone, gone + most)
    places[:head] = 0
    found = Sample(found.ids[places], found.trained[places], True)
  return found if found.teaches else None


def behind(before: Sequence[int], found: Sample) -> Sample:
  """A sample behind placeholders: the same of its tokens are trained."""
  if not before:
    return found
  trained = np.pad(found.trained, (len(before), 0))
  trained[len(before)] = False
  return Sample(batching_packing.put(before, found.ids), trained, found.cut)


def padded(samples: Sequence[Sample], length: int) -> dict[str, np.ndarray]:
  """Rows of one sample each.

  Returns:
    inputs, targets (the token that follows each) int32 [b, t], inputs_mask
    (real tokens) and targets_mask (trained ones) bool [b, t].
  """
  inputs, targets = np.full((2, len(samples), length), PAD, np.int32)
  real, trained = np.zeros((2, len(samples), length), bool)
  for row, one in enumerate(samples):
    n = len(one.ids) - 1
    inputs[row, :n], targets[row, :n] = one.ids[:-1], one.ids[1:]
    real[row, :n], trained[row, :n] = True, one.trained[1:]
  return {
    'inputs': inputs,
    'targets': targets,
    'inputs_mask': real,
    'targets_mask': trained,
  }


def packed(
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
  whole = padded(samples, length)
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
class Samples:
  """The form of decoder-only models' batches; see `batching.collators`.

  Attributes:
    words: the vocabulary.
    length: tokens of a row, that is, fed: a sample has one more.
    too_long: see `shortened`.
    packed: whether rows hold several samples.
    seed: of the packed rows' order.
    before: placeholders of a soft prompt, in front of all texts; they count,
      and none is trained, nor the token that follows them.
  """

  words: Vocabulary
  length: int
  too_long: str = 'prompt'
  packed: bool = False
  seed: int = 0
  before: tuple[int, ...] = ()

  def __post_init__(self):
    check_too_long(self.too_long)
    batching_packing.room(self.length, self.before, 'config.data.length')

  def encode(self, items: Sequence) -> list[Sample]:
    """Samples that fit of examples, samples, and pairs of ids.

    Raises:
      ValueError: none of them leaves a token to train.
    """
    most = self.rooms[0] + 1
    short = (
      shortened(one, most, self.too_long, self.words.bos)
      for one in self.whole(items)
    )
    kept = [behind(self.before, one) for one in short if one is not None]
    if items and not kept:
      raise ValueError(
        f'none of {len(items)} examples has a token to train in '
        f'config.data.length={self.length} with config.data.too_long='
        f'{self.too_long!r}; raise the length'
      )
    return kept

  def whole(self, items: Sequence) -> list[Sample]:
    """Samples of any length, in the order of the items."""
    texts = [e for e in items if isinstance(e, Example)]
    made = iter(
      zip(
        prompts(self.words, [e.inputs for e in texts]),
        answers(self.words, [e.targets for e in texts]),
        strict=True,
      )
    )
    found = []
    for item in items:
      if isinstance(item, Sample):
        found.append(item)
      else:
        pair = next(made) if isinstance(item, Example) else item
        found.append(sample(*pair))
    return found

  def rows(self, number: int, encoded: Sequence[Sample]):
    """A window's rows: see `packed` and `padded`."""
    if not self.packed:
      return self.padded(encoded)
    rng = np.random.default_rng((self.seed, number))
    lengths = np.array(self.sizes(encoded)[0])
    return self.laid(encoded, packing.shuffled(lengths, self.lengths, rng))

  def laid(self, encoded: Sequence[Sample], bins: Sequence[Sequence[int]]):
    return packed(encoded, self.length, bins)

  def padded(self, encoded: Sequence[Sample]) -> dict[str, np.ndarray]:
    return padded(encoded, self.length)

  def cut(self, items: Sequence) -> int:
    """How many of them are too long."""
    most = self.rooms[0] + 1
    return sum(len(s.ids) > most or s.cut for s in self.whole(items))

  @property
  def longer(self) -> str:
    """What to raise so that nothing is cut."""
    return 'config.data.length'

  @property
  def lengths(self) -> tuple[int]:
    return (self.length,)

  @property
  def rooms(self) -> tuple[int]:
    return (self.length - len(self.before),)

  def resized(self, lengths: tuple[int]) -> 'Samples':
    return dataclasses.replace(self, length=lengths[0])

  def sizes(
    self, encoded: Sequence[Sample]
  ) -> tuple[list[tuple[int]], list[int]]:
    """(tokens fed, trained tokens) of each."""
    trained = [int(one.trained[1:].sum()) for one in encoded]
    return [(len(one.ids) - 1,) for one in encoded], trained
