# SPDX-License-Identifier: Apache-2.0
"""Where training examples come from, by config.

What is trained on is endless and random-access: item i is the same example at
every call, whatever was read before it.
"""

import collections
import dataclasses
from collections.abc import Sequence

import grain
from ml_collections import ConfigDict

from moepeft import tasks
from moepeft.data import jsonl, mixing
from moepeft.tasks import Example

_ENDLESS = 1 << 60


@dataclasses.dataclass(frozen=True)
class Sources:
  """What a config trains on.

  Attributes:
    train: endless examples.
    shares: the share of each dataset in them, which add up to one.
    rows: the training rows where they have an end, else none.
    held_out: examples that `train` never gives.
    notes: lines for the user: what was skipped or left out.
  """

  train: grain.MapDataset
  shares: dict[str, float]
  rows: Sequence[Example]
  held_out: list[Example]
  notes: tuple[str, ...] = ()


def sources(data: ConfigDict, seed: int) -> Sources:
  """Opens config.data.

  Raises:
    ValueError: an unknown source, path, task family or mixture, or rows that
      are not of the form.
  """
  if data.source == 'tasks':
    return _tasks(data.tasks, seed)
  if data.source == 'jsonl':
    if not data.path:
      raise ValueError('set config.data.path to .jsonl rows, or a directory')
    return _of_rows(jsonl.read(data.path), data, seed)
  raise ValueError(
    f"config.data.source is 'tasks' or 'jsonl'; got {data.source!r}"
  )


def _tasks(group: str, seed: int) -> Sources:
  names = tasks.families(group)
  counts = collections.Counter(names)
  return Sources(
    train=grain.MapDataset.source(Drawn(names, seed)),
    shares={name: count / len(names) for name, count in counts.items()},
    rows=(),
    held_out=tasks.examples(
      names, 32 * len(names), seed=seed, split='held_out'
    ),
  )


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Embedded tasks, drawn when they are asked for."""

  names: tuple[str, ...]
  seed: int

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, place: int) -> Example:
    return tasks.example(self.names, place, seed=self.seed)


def _of_rows(rows: Sequence[Example], data: ConfigDict, seed: int) -> Sources:
  """Rows split by `idx`, grouped by dataset and mixed at the config's rates."""
  train, held_out = jsonl.split(rows, data.held_out)
  groups = collections.defaultdict(list)
  for row in train:
    groups[row.task].append(row)
  sizes = {name: len(group) for name, group in groups.items()}
  weights = mixing.rates(sizes, data.cap, data.temperature)
  total = sum(weights.values())
  return Sources(
    train=mixing.mix(groups, weights, seed),
    shares={name: weight / total for name, weight in weights.items()},
    rows=train,
    held_out=held_out,
  )
