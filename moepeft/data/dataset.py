# SPDX-License-Identifier: Apache-2.0
"""Training and held-out examples of a config."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from moepeft.data import mixing, t0_mixtures
from moepeft.data.batching.collators import Collator
from moepeft.data.example import ExampleRows
from moepeft.data.readers import promptsource
from moepeft.data.split import split_by_idx
from moepeft.tasks import Example

Encoded = dict[str, np.ndarray]  # 'inputs' and 'targets', int32 [n] each


@dataclasses.dataclass(frozen=True)
class TrainingData:
  """Training examples of a config, and its held-out examples.

  Items of `train` and `held_out` are `Example`s, or encoded already as the
  model's collator encodes them (a `Sample`, or a pair of ids).

  Attributes:
    train: endless dataset with random access; None for sources that can only
      be read in order.
    shares: each dataset's share of the examples; they add up to one.
    rows: the training rows of a finite source, else empty.
    held_out: examples that are not in `train`.
    held_out_datasets: the dataset of each of them; empty for `Example`s, which
      name it, and where there is one alone.
    notes: lines for the user about rows that were skipped or left out.
    preferences: the `preference.dataset.PreferenceDataset` of a source of
      preferences, else None.
    replay: the schedule of a source with replayed text, else None; dataset 1
      of it is the replayed text.
    open_stream: (index) -> endless encoded examples from that index on; only
      of sources that must be read in order.
    read_held_out: (count) -> at most `count` encoded held-out examples of such
      a source.
  """

  train: grain.MapDataset | None
  shares: dict[str, float]
  rows: Sequence[Example] = ()
  held_out: Sequence = ()
  held_out_datasets: Sequence[str] = ()
  notes: tuple[str, ...] = ()
  preferences: Any = None
  replay: mixing.MixtureSchedule | None = None
  open_stream: Callable[[int], Iterator[Encoded]] | None = None
  read_held_out: Callable[[int], list[Encoded]] | None = None

  def held_out_by_dataset(self, name: str) -> dict[str, Sequence]:
    """The held-out examples of each dataset.

    Args:
      name: of the dataset, if the source has one without a name.
    """
    names = self.held_out_datasets
    if not names and len(self.held_out):
      # Text has many rows, which are read one by one.
      if not isinstance(self.held_out[0], Example):
        return {name: self.held_out}
      names = [example.task for example in self.held_out]
    result = collections.defaultdict(list)
    for item, dataset in zip(self.held_out, names, strict=True):
      result[dataset].append(item)
    return dict(result)

  def validation(self, collator: Collator, count: int) -> list:
    """At most `count` encoded held-out examples, evenly from all datasets."""
    if self.read_held_out is not None:
      examples = self.read_held_out(count)
      return collator.encode([(e['inputs'], e['targets']) for e in examples])
    return collator.encode(evenly_spaced(self.held_out, count))


def from_examples(
  rows: ExampleRows, data: ConfigDict, seed: int
) -> TrainingData:
  """Splits examples by `idx` and mixes their datasets at the config's rates.

  Args:
    rows: examples of any datasets; an example's dataset is its `task`.

  Raises:
    ValueError: no row is left to train on, or config.data.mixture does not
      match the rows.
  """
  train, held_out = split_by_idx(rows, data.validation_fraction)
  groups = collections.defaultdict(list)
  for row in train:
    groups[(row.task, row.template) if data.mixture else row.task].append(row)
  sizes = {name: len(group) for name, group in groups.items()}
  notes = list(rows.notes(data.path))
  if data.mixture:
    original = promptsource.original_prompts(
      data.templates, {dataset for dataset, _ in sizes}
    )
    mixture = t0_mixtures.mixture_rates(data.mixture, sizes, original)
    notes += mixture.notes(data.mixture)
    weights = {'/'.join(pair): rate for pair, rate in mixture.rates.items()}
    groups = {'/'.join(pair): groups[pair] for pair in mixture.rates}
  else:
    weights = mixing.mixing_rates(
      sizes, data.max_examples_per_task, data.temperature
    )
  return TrainingData(
    train=mixing.mix(groups, weights, seed),
    shares=mixing.normalize(weights),
    rows=train,
    held_out=held_out,
    notes=tuple(notes),
  )


def evenly_spaced(rows: Sequence, max_rows: int) -> list:
  """Evenly spaced rows, so that every dataset and template has its share."""
  count = min(max_rows, len(rows))
  return [rows[i * len(rows) // count] for i in range(count)]


def path_name(path: str) -> str:
  """The last part of a path, as a dataset's name.

  Row order is seeded by this name, so moving a file does not change it.
  """
  return os.path.basename(os.path.normpath(path)) or path
