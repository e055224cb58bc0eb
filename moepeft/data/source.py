# SPDX-License-Identifier: Apache-2.0
"""Where training examples come from, as functions of a step's place.

A source is stateless: `source(index)` is the same example at every call, so
resuming needs the step's number and nothing else.
"""

import collections
import functools
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from moepeft import tasks
from moepeft.data import jsonl
from moepeft.tasks import Example

Source = Callable[[int], Example]


def sources(
  data: ConfigDict, seed: int
) -> tuple[Source, list[Example], list[Example]]:
  """A config's training source, its held-out examples, and its rows.

  Rows are empty where the source has no end.

  Raises:
    ValueError: an unknown source, path, task family or way to sample.
  """
  if data.source == 'tasks':
    names = tasks.families(data.tasks)
    train = functools.partial(tasks.example, names, seed=seed)
    held_out = tasks.examples(
      names, 32 * len(names), seed=seed, split='held_out'
    )
    return train, held_out, []
  if data.source == 'jsonl':
    if not data.path:
      raise ValueError('set config.data.path to .jsonl rows, or a directory')
    rows = jsonl.read(data.path)
    train, held_out = jsonl.split(rows, data.held_out)
    return shuffled(train, seed, data.sample), held_out, train
  raise ValueError(
    f"config.data.source is 'tasks' or 'jsonl'; got {data.source!r}"
  )


def shuffled(rows: Sequence[Example], seed: int, sample: str) -> Source:
  """An endless stream over rows.

  Args:
    rows: the training rows.
    seed: of the order.
    sample: 'rows', each epoch a new permutation of all rows; or 'datasets',
      the datasets in turn (in a new order each round), each with permuted
      epochs of its own.
  """
  if sample == 'rows':
    return lambda i: rows[_place(i, len(rows), (seed, 0))]
  if sample != 'datasets':
    raise ValueError(
      f"config.data.sample is 'rows' or 'datasets'; got {sample!r}"
    )
  groups = collections.defaultdict(list)
  for row in rows:
    groups[row.task].append(row)
  groups = [groups[name] for name in sorted(groups)]

  def pick(i: int) -> Example:
    group = _place(i, len(groups), (seed, 1))
    # A dataset comes once in each round, so the round numbers its examples.
    return groups[group][
      _place(i // len(groups), len(groups[group]), (seed, 2 + group))
    ]

  return pick


def _place(i: int, size: int, key: tuple[int, ...]) -> int:
  epoch, offset = divmod(i, size)
  return int(_permutation(size, (*key, epoch))[offset])


@functools.lru_cache(maxsize=512)
def _permutation(size: int, key: tuple[int, ...]) -> np.ndarray:
  return np.random.default_rng(key).permutation(size)
