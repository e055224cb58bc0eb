# SPDX-License-Identifier: Apache-2.0
"""Datasets and batches of compared answers (pairs) and of judged answers.

A side is a prompt with one answer. Pairs have the sides chosen and rejected; a
judged answer has its own side, and one with an answer to another prompt, of
which KTO measures the KL divergence.
"""

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
  """A tokenized row.

  Attributes:
    sides: the k sides, as the model's collator encodes them.
    label: whether a judged answer is good; None for a pair.
    idx: index of the row in its file.
    group: index of the first row with this prompt; the split is by group.
    index: index of the example in its dataset.
    references: float32 [k, t], the reference model's log p of each side's
      targets, if it was computed before training.
  """

  sides: tuple
  label: bool | None
  idx: int
  group: int
  index: int
  references: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class PairCollator:
  """The collator of batches with two sides; see `collators.Collator`.

  Attributes:
    side_collator: the model's collator, which encodes one side.
    judged: whether answers are judged one by one, not compared in pairs.
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
    """The prefixes of the batches' keys, one for each side."""
    return JUDGED if self.judged else PAIR

  def encode(
    self, items: Sequence[PreferenceExample]
  ) -> list[PreferenceExample]:
    """Returns the items, which are encoded already."""
    return list(items)

  def rows(
    self, window: int, encoded: Sequence[PreferenceExample]
  ) -> collators.Rows:
    """Rows as of `pack` or `pad`."""
    if not self.packed:
      return self.pad(encoded)
    rng = np.random.default_rng((self.seed, window))
    side_lengths = [
      self.side_collator.sizes(side)[0] for side in self._by_side(encoded)
    ]
    lengths = np.concatenate(side_lengths, axis=1)
    capacity = self.lengths * len(self.sides)
    return self.pack(encoded, packing.shuffled_bins(lengths, capacity, rng))

  def pad(self, encoded: Sequence[PreferenceExample]) -> collators.Rows:
    """The side collator's batch of each side, with a prefix on its keys.

    Returns:
      For pairs 'chosen_inputs', ..., 'rejected_inputs', ...; for judged answers
      'inputs', ..., 'kl_inputs', ... and 'label' bool [b]. If the examples have
      references, '<side>reference' float32 [b, t] of each side.
    """
    batch = {}
    for i, side in enumerate(self._by_side(encoded)):
      batch |= self._with_side(i, self.side_collator.pad(side))
      if encoded[0].references is not None:
        references = np.stack([item.references[i] for item in encoded])
        batch[f'{self.sides[i]}reference'] = references
    if self.judged:
      batch['label'] = np.array([item.label for item in encoded])
    return batch

  def pack(
    self, encoded: Sequence[PreferenceExample], bins: Sequence[Sequence[int]]
  ) -> collators.Rows:
    """Rows of several examples each, with equal segment ids on all sides.

    Returns:
      The arrays of `pad`, with the side collator's segments and positions.
      'label' is [b, t]: entry i is the label of segment i + 1.
    """
    batch, t = {}, self.lengths[-1]
    for i, side in enumerate(self._by_side(encoded)):
      batch |= self._with_side(i, self.side_collator.pack(side, bins))
      if encoded[0].references is not None:
        references = np.zeros((len(bins), t), np.float32)
        # The last length of a collator is that of the targets.
        lengths = [size[-1] for size in self.side_collator.sizes(side)[0]]
        for row, items in enumerate(bins):
          packed = np.concatenate(
            [encoded[j].references[i][: lengths[j]] for j in items]
          )
          references[row, : len(packed)] = packed
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

  def _with_side(self, side: int, rows: collators.Rows) -> collators.Rows:
    return {f'{self.sides[side]}{key}': array for key, array in rows.items()}

  def count_truncated(self, items: Sequence[PreferenceExample]) -> int:
    """0: `preference.rows.notes` counts them when the rows are read."""
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
    """(each item's longest lengths, target tokens of all its sides)."""
    lengths, num_targets = [], []
    for item in encoded:
      side_lengths, side_targets = self.side_collator.sizes(item.sides)
      lengths.append(tuple(map(max, zip(*side_lengths, strict=True))))
      num_targets.append(sum(side_targets))
    return lengths, num_targets


@dataclasses.dataclass(frozen=True)
class PreferenceDataset:
  """The examples of a source of preferences.

  Attributes:
    items: the rows that fit, in the source's order.
    notes: lines for the user.
  """

  items: tuple[PreferenceExample, ...]
  notes: tuple[str, ...]

  @property
  def sha256(self) -> str:
    """The hash of all ids and loss masks, in order."""
    digest = hashlib.sha256()
    for item in self.items:
      for side in item.sides:
        # Without `routed_by`, which older runs' hashes do not have.
        fields = (
          (side.ids, side.loss_mask, side.cut)
          if isinstance(side, Sample)
          else side[:2]
        )
        for field in fields:
          array = np.asarray(field, np.int32)
          digest.update(np.int64(array.size).tobytes() + array.tobytes())
    return digest.hexdigest()

  def with_references(self, references: np.ndarray) -> 'PreferenceDataset':
    """The same items with references float32 [items, k, t]."""
    items = (
      dataclasses.replace(item, references=references[i])
      for i, item in enumerate(self.items)
    )
    return dataclasses.replace(self, items=tuple(items))

  def split(
    self, held_out: float
  ) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """Splits the items into (training, validation), by prompt.

    See `moepeft.data.split.hold_out_last`.

    Args:
      held_out: the share of the rows to hold out.

    Raises:
      ValueError: no row is left to train on.
    """
    groups = {item.idx: item.group for item in self.items}
    mask = data_split.hold_out_last(list(groups.values()), held_out)
    if all(mask):
      raise ValueError(f'held_out={held_out} leaves no row to train on')
    is_held_out = dict(zip(groups, mask, strict=True))
    train = [item for item in self.items if not is_held_out[item.idx]]
    return train, [item for item in self.items if is_held_out[item.idx]]


def objective_collator(
  data: ConfigDict, objective: str, batch: str, collator: collators.Collator
) -> collators.Collator:
  """Makes the collator of an objective's batches.

  Args:
    objective: config.objective.
    batch: the kind of batch in its `ObjectiveSpec`.
    collator: the model's collator.

  Raises:
    ValueError: config.data.source has no rows for such batches, or the method
      has a soft prompt and the objective compares answers.
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
  """Reads and tokenizes the rows of config.data.path.

  Args:
    collator: of `objective_collator`; if it is for judged answers, a pair
      becomes two of them.
    render: encodes a decoder's conversations; by default with the chat
      template, or as plain text if the tokenizer has none.

  Raises:
    ValueError: there is no such file, a row is malformed (the message names
      the file and the row) or of no use to the objective, or no row fits.
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
  rows, encoded, locations = preference_rows.read_rows(
    data, bad, judged, encode
  )
  budgets: list[preference_tokenize.AnswerBudget | None] = []
  # Locations of the rows whose answers have equal ids.
  equal_answers = []
  for answers, location in zip(encoded, locations, strict=True):
    budget = preference_tokenize.fit_answers(
      answers, side_collator, data.truncation
    )
    if budget is not None and preference_tokenize.answers_equal(
      answers, budget
    ):
      equal_answers.append(location)
      budget = None
    budgets.append(budget)
  row_indices = [i for i, budget in enumerate(budgets) if budget is not None]
  if equal_answers and not row_indices:
    raise ValueError(
      f'no row of {data.path} compares answers that differ to the tokenizer '
      f'within {side_collator.length_keys} (the first: {equal_answers[0]}); '
      'mend the rows, or raise the length'
    )
  if not row_indices:
    raise ValueError(
      f'none of {len(rows)} rows of {data.path} fits '
      f'{side_collator.length_keys} with '
      f'config.data.truncation={data.truncation!r} (the first: '
      f'{locations[0]}); raise the length'
    )
  mismatched = (
    preference_formats.mismatched_indices(
      [rows[i] for i in row_indices], data.path
    )
    if judged
    else ()
  )
  items, groups = [], {}
  for index, i in enumerate(row_indices):
    budget = budgets[i]
    sides = [
      preference_tokenize.make_side(
        budget.prompt, answer, budget.answer_length, side_collator
      )
      for answer in encoded[i].answers
    ]
    if judged:
      mismatched_answer = encoded[row_indices[mismatched[index]]].answers[0]
      sides.append(
        preference_tokenize.make_side(
          budget.prompt, mismatched_answer, budget.max_length, side_collator
        )
      )
    label = rows[i].label if judged else None
    group = groups.setdefault(repr(rows[i].prompt.turns), rows[i].idx)
    items.append(
      PreferenceExample(tuple(sides), label, rows[i].idx, group, index)
    )
  notes = preference_rows.notes(
    data, locations, budgets, equal_answers, bad, side_collator
  )
  labels = {item.label for item in items}
  if judged and len(labels) == 1:
    notes = (*notes, _one_class_note(data.path, labels == {True}))
  return PreferenceDataset(tuple(items), notes)


def _one_class_note(path: str, good: bool) -> str:
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
