# SPDX-License-Identifier: Apache-2.0
"""The examples that a config trains on, and those that it holds out."""

import dataclasses
from collections.abc import Sequence

import grain

from moepeft.data import mixing
from moepeft.data.batching.collators import Collator
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.readers.seqio_stream import SeqioStream
from moepeft.tasks import Example


@dataclasses.dataclass(frozen=True)
class TrainingData:
  """Training examples of a config, and its held-out examples.

  Attributes:
    train: endless examples (some may be ids already), or a stream of ids.
    shares: the share of each dataset in them, which add up to one.
    rows: the training rows where they have an end, else none.
    held_out: examples, or what is ids already, that `train` never gives.
    notes: lines for the user about rows that were skipped or left out.
    compared: the rows that were read of the source 'preference'.
    replay: (1, ...) at each place of `train` that is replayed text, else None.
  """

  train: grain.MapDataset | SeqioStream
  shares: dict[str, float]
  rows: Sequence[Example] = ()
  held_out: Sequence = ()
  notes: tuple[str, ...] = ()
  compared: preference_dataset.PreferenceDataset | None = None
  replay: mixing.MixtureSchedule | None = None

  def validation(self, own: Collator, count: int) -> list:
    """At most `count` held-out examples as ids, of all datasets."""
    if isinstance(self.train, SeqioStream):
      held_out = self.train.validation(count)
      return own.encode([(e['inputs'], e['targets']) for e in held_out])
    return own.encode(evenly_spaced(self.held_out, count))


def evenly_spaced(rows: Sequence, most: int) -> list:
  """Evenly spaced rows, so that every dataset and template has its share."""
  count = min(most, len(rows))
  return [rows[i * len(rows) // count] for i in range(count)]
