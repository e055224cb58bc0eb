# SPDX-License-Identifier: Apache-2.0
"""Compared and judged answers as batches with several sides."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from moepeft.core.types import JUDGED, PAIR
from moepeft.data import mixing
from moepeft.data import split as data_split
from moepeft.data.batching import collators, packing
from moepeft.data.batching.decoder_only import Sample
from moepeft.data.dataset import TrainingData, path_name
from moepeft.data.example import BadRows
from moepeft.data.preference import formats as preference_formats
from moepeft.data.preference import rows as preference_rows
from moepeft.data.preference import tokenize as preference_tokenize
from moepeft.data.readers import READERS
from moepeft.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceExample:
  """A row as ids.

  Attributes:
    sides: each answer with its prompt, as the model's collator encodes it.
    label: whether a judged answer is a good one; None of a pair.
    idx: of the row in its file.
    group: index of the first row with this prompt; the split is by group.
    place: among all items of its source.
    references: float32 [k, t], log p of each target of each side, where it
      was computed before training.
  """

  sides: tuple
  label: bool | None
  idx: int
  group: int
  place: int
  references: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class PairCollator:
  """The collator of batches with several sides; see `collators.Collator`.

  Attributes:
    side_collator: of one side.
    judged: whether answers are judged one by one, not compared.
  """

  side_collator: collators.Collator
  judged: bool

  @property
  def packed(self) -> bool:
    return self.side_collator.packed

  @property
  def seed(self) -> int:
    return self.side_collator.seed

  @property
  def prefix_ids(self) -> tuple[int, ...]:
    return self.side_collator.prefix_ids

  @property
  def tokenizer(self) -> Tokenizer:
    return self.side_collator.tokenizer

  @property
  def sides(self) -> tuple[str, str]:
    """The prefixes of its batches' keys."""
    return JUDGED if self.judged else PAIR

  def encode(
    self, items: Sequence[PreferenceExample]
  ) -> list[PreferenceExample]:
    """The items, which are encoded already."""
    return list(items)

  def rows(
    self, number: int, encoded: Sequence[PreferenceExample]
  ) -> collators.Rows:
    """A window's rows: see `padded` and `laid`."""
    if not self.packed:
      return self.pad(encoded)
    rng = np.random.default_rng((self.seed, number))
    fills = [
      self.side_collator.sizes(side)[0] for side in self._by_side(encoded)
    ]
    lengths = np.concatenate(fills, axis=1)
    capacity = self.lengths * len(self.sides)
    return self.pack(encoded, packing.shuffled_bins(lengths, capacity, rng))

  def pad(self, encoded: Sequence[PreferenceExample]) -> collators.Rows:
    """A batch of each side, its keys after the side's name.

    Returns:
      'chosen_inputs', ..., 'rejected_inputs', ... of pairs; 'inputs', ...,
      'kl_inputs', ... and 'label' bool [b] of judged answers; and
      'chosen_reference' ('reference' of judged ones) and its like, float32
      [b, t], where the items have them.
    """
    batch = {}
    for i, side in enumerate(self._by_side(encoded)):
      batch |= self._named(i, self.side_collator.pad(side))
      if encoded[0].references is not None:
        references = np.stack([item.references[i] for item in encoded])
        batch[f'{self.sides[i]}reference'] = references
    if self.judged:
      batch['label'] = np.array([item.label for item in encoded])
    return batch

  def pack(
    self, encoded: Sequence[PreferenceExample], bins: Sequence[Sequence[int]]
  ) -> collators.Rows:
    """Rows of several items each, which have the same segment on every side.

    Returns:
      As `padded`, with the segments and positions of the model's own form;
      'label' is [b, t], of each segment from 1 on.
    """
    batch, t = {}, self.lengths[-1]
    for i, side in enumerate(self._by_side(encoded)):
      batch |= self._named(i, self.side_collator.pack(side, bins))
      if encoded[0].references is not None:
        references = np.zeros((len(bins), t), np.float32)
        # Targets fill the last of a form's lengths.
        ends = [size[-1] for size in self.side_collator.sizes(side)[0]]
        for row, items in enumerate(bins):
          parts = [encoded[j].references[i][: ends[j]] for j in items]
          whole = np.concatenate(parts)
          references[row, : len(whole)] = whole
        batch[f'{self.sides[i]}reference'] = references
    if self.judged:
      batch['label'] = np.zeros((len(bins), t), bool)
      for row, items in enumerate(bins):
        labels = [encoded[j].label for j in items]
        batch['label'][row, : len(items)] = labels
    return batch

  def _by_side(self, encoded: Sequence[PreferenceExample]) -> list[list]:
    return [
      list(side) for side in zip(*(e.sides for e in encoded), strict=True)
    ]

  def _named(self, side: int, rows: collators.Rows) -> collators.Rows:
    return {f'{self.sides[side]}{key}': array for key, array in rows.items()}

  def count_cut(self, items: Sequence[PreferenceExample]) -> int:
    """0: what was too long was told when the rows were read."""
    del items
    return 0

  @property
  def length_keys(self) -> str:
    return self.side_collator.length_keys

  @property
  def lengths(self) -> tuple[int, ...]:
    return self.side_collator.lengths

  @property
  def max_lengths(self) -> tuple[int, ...]:
    return self.side_collator.max_lengths

  def resized(self, lengths: tuple[int, ...]) -> 'PairCollator':
    return dataclasses.replace(
      self, side_collator=self.side_collator.resized(lengths)
    )

  def sizes(self, encoded: Sequence[PreferenceExample]):
    """(the longest side of each item, trained tokens of all its sides)."""
    places, trained = [], []
    for item in encoded:
      side_sizes, tokens = self.side_collator.sizes(item.sides)
      places.append(tuple(map(max, zip(*side_sizes, strict=True))))
      trained.append(sum(tokens))
    return places, trained


@dataclasses.dataclass(frozen=True)
class PreferenceDataset:
  """The encoded rows of a source of preferences.

  Attributes:
    items: rows that fit, in the source's order.
    notes: lines for the user.
  """

  items: tuple[PreferenceExample, ...]
  notes: tuple[str, ...]

  @property
  def sha256(self) -> str:
    """The hash of every id and of the loss masks, in order."""
    digest = hashlib.sha256()
    for item in self.items:
      for side in item.sides:
        arrays = vars(side).values() if isinstance(side, Sample) else side
        for part in arrays:
          array = np.asarray(part, np.int32)
          digest.update(np.int64(array.size).tobytes() + array.tobytes())
    return digest.hexdigest()

  def with_references(self, references: np.ndarray) -> 'PreferenceDataset':
    """The same items with theirs of float32 [items, k, t]."""
    items = (
      dataclasses.replace(item, references=references[i])
      for i, item in enumerate(self.items)
    )
    return dataclasses.replace(self, items=tuple(items))

  def split(
    self, held_out: float
  ) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """(training, validation), all answers to a prompt on one side.

    See `moepeft.data.split.last`.

    Raises:
      ValueError: nothing is left to train on.
    """
    rows = {item.idx: item.group for item in self.items}
    out = data_split.hold_out_last(list(rows.values()), held_out)
    held_out_rows = {idx for idx, away in zip(rows, out, strict=True) if away}
    if len(held_out_rows) == len(rows):
      raise ValueError(f'held_out={held_out} leaves no row to train on')
    parts = [], []
    for item in self.items:
      parts[item.idx in held_out_rows].append(item)
    return parts


def objective_collator(
  data: ConfigDict, objective: str, batch: str, collator: collators.Collator
) -> collators.Collator:
  """The collator of an objective's batches.

  Args:
    objective: config.objective.
    batch: of its `ObjectiveSpec`.
    collator: the model's.

  Raises:
    ValueError: the objective and config.data.source are not of one kind, or
      the method has a soft prompt and the objective compares answers.
  """
  if batch not in READERS.lookup(data.source).batches:
    sources = [name for name in READERS if batch in READERS[name].batches]
    raise ValueError(
      f'config.objective={objective!r} does not go with config.data.source='
      f'{data.source!r}: the rows of its batches ({batch}) are those of '
      f'{" or ".join(map(repr, sources)) or "no source"}; set one of the two'
    )
  if batch == 'single':
    return collator
  if collator.prefix_ids:
    raise ValueError(
      f'config.objective={objective!r} does not go with a soft prompt: no '
      'objective that compares answers has placeholders in what its reference '
      'reads; leave `prompt` out of config.method, or take another objective'
    )
  return PairCollator(collator, batch == 'judged')


def read_preferences(
  data: ConfigDict,
  collator: collators.Collator,
  render: preference_tokenize.Render | None = None,
) -> PreferenceDataset:
  """Reads config.data.path and makes ids of it.

  Args:
    collator: of `objective_collator`; where answers are judged, a pair becomes
      two of them.
    render: of a decoder; by default the chat template, or plain text where
      the tokenizer has none.

  Raises:
    ValueError: no such file; a row that is not of the form (the message names
      the file and the row), or of no use to the objective; or none that fits.
  """
  if not isinstance(collator, PairCollator):
    raise ValueError(
      f'rows of config.data.source={data.source!r} are for objectives that '
      'compare or judge answers; name other rows to evaluate'
    )
  side_collator, judged = collator.side_collator, collator.judged
  if not data.path:
    raise ValueError(
      'set config.data.path to a .json or .jsonl file of preferences, or to a '
      'name on the hub'
    )
  bad = BadRows(data.on_bad_row, data.ignore_fields)
  encode = preference_tokenize.row_encoder(data, side_collator, render)
  rows, parts, places = preference_rows.rows(data, bad, judged, encode)
  spans = [
    preference_tokenize.fit_answers(is_same, side_collator, data.truncation)
    for is_same in parts
  ]
  same = [
    span is not None and preference_tokenize.answers_equal(is_same, span)
    for is_same, span in zip(parts, spans, strict=True)
  ]
  spans = [
    None if is_same else x for x, is_same in zip(spans, same, strict=True)
  ]
  alike = [
    place for place, is_same in zip(places, same, strict=True) if is_same
  ]
  kept_rows = [i for i, span in enumerate(spans) if span is not None]
  if alike and not kept_rows:
    raise ValueError(
      f'no row of {data.path} compares answers that differ to the tokenizer '
      f'within {side_collator.length_keys} (the first: {alike[0]}); mend the '
      'rows, or raise the length'
    )
  if not kept_rows:
    raise ValueError(
      f'none of {len(rows)} rows of {data.path} fits '
      f'{side_collator.length_keys} with '
      f'config.data.truncation={data.truncation!r} (the first: {places[0]}); '
      'raise the length'
    )
  mismatched = (
    preference_formats.mismatched([rows[i] for i in kept_rows], data.path)
    if judged
    else ()
  )
  items, groups = [], {}
  for place, i in enumerate(kept_rows):
    prompt, cap = spans[i].prompt, spans[i].cap
    sides = [
      preference_tokenize.make_side(prompt, answer, cap, side_collator)
      for answer in parts[i].answers
    ]
    if judged:
      mismatched_answer = parts[kept_rows[mismatched[place]]].answers[0]
      sides.append(
        preference_tokenize.make_side(
          prompt, mismatched_answer, spans[i].room, side_collator
        )
      )
    label = rows[i].label if judged else None
    first = groups.setdefault(repr(rows[i].prompt.turns), rows[i].idx)
    items.append(
      PreferenceExample(tuple(sides), label, rows[i].idx, first, place)
    )
  notes = preference_rows.notes(data, places, spans, alike, bad, side_collator)
  labels = {item.label for item in items}
  if judged and len(labels) == 1:
    notes = (*notes, _one_class(data.path, labels == {True}))
  return PreferenceDataset(tuple(items), notes)


def _one_class(path: str, good: bool) -> str:
  present, missing = ('good', 'bad') if good else ('bad', 'good')
  return (
    f'note: every answer of {path} is {present} and none is {missing}, so that '
    f'kto has one side alone; add rows whose label is {str(not good).lower()}'
  )


def preference_data(
  preferences: PreferenceDataset, data: ConfigDict, seed: int
) -> TrainingData:
  """Splits answers into those to train on and those held out.

  Raises:
    ValueError: config.data.validation_fraction leaves nothing to train on.
  """
  train, held_out = preferences.split(data.validation_fraction)
  name = path_name(data.path)
  return TrainingData(
    train=mixing.mix({name: train}, {}, seed),
    shares={name: 1.0},
    held_out=held_out,
    notes=preferences.notes,
    preferences=preferences,
  )
