# SPDX-License-Identifier: Apache-2.0
"""Mixes datasets at rates into an endless one, each in shuffled epochs."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence

import grain
import numpy as np
from grain.experimental import index_shuffle

# Items of a block. The order of datasets is shuffled within a block, and each
# block has the exact count of every dataset.
_BLOCK = 1024
# Rates are integers in units of 1 / _RATE_UNITS, so that counts are exact.
_RATE_UNITS = 1 << 40
_ENDLESS = 1 << 60
# Above this size a permutation is computed item by item, not stored.
_MAX_STORED_PERMUTATION = 1 << 16


def mixing_rates(
  sizes: Mapping[str, int], cap: int = 0, temperature: float = 1.0
) -> dict[str, float]:
  """min(size, cap) ** (1 / temperature) of each dataset.

  Source: Raffel et al., arXiv:1910.10683, section 3.5.2: proportional (no cap,
  temperature 1), capped, temperature-scaled, and equal (temperature inf).

  Args:
    sizes: rows of each dataset.
    cap: an upper bound of a dataset's size; 0 for none.

  Raises:
    ValueError: the temperature is so low that a rate overflows.
  """
  capped = {k: min(n, cap) if cap else n for k, n in sizes.items()}
  try:
    return {k: n ** (1 / temperature) for k, n in capped.items()}
  except OverflowError:
    raise ValueError(
      f'config.data.temperature={temperature} makes the rate of a dataset too '
      'large; raise it towards 1'
    ) from None


def mix(
  datasets: Mapping[str, Sequence], weights: Mapping[str, float], seed: int
) -> grain.MapDataset:
  """An endless dataset that draws from `datasets` at rates.

  Item i is a pure function of the arguments. Each dataset's rows come in
  epochs, and an epoch is a permutation of all of them that does not depend on
  the other datasets. The order of datasets is shuffled within blocks that hold
  every rate exactly.

  Args:
    datasets: name -> rows, none empty.
    weights: name -> rate above zero; they need not add up to one.
  """
  names = sorted(datasets)
  parts = [
    grain.MapDataset.source(
      ShuffledEpochs(datasets[name], _dataset_seed(seed, name))
    )
    for name in names
  ]
  if len(parts) == 1:
    return parts[0]
  schedule = MixtureSchedule(tuple(weights[name] for name in names), seed)
  return grain.MapDataset.select_from_datasets(parts, schedule)


def normalize(weights: dict[str, float]) -> dict[str, float]:
  """Scales weights so that they add up to one."""
  total = sum(weights.values())
  return {name: weight / total for name, weight in weights.items()}


@dataclasses.dataclass(frozen=True)
class ShuffledEpochs:
  """Endless rows in epochs, each a permutation of all rows."""

  rows: Sequence
  seed: int

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int):
    epoch, offset = divmod(index, len(self.rows))
    return self.rows[_permuted_index(offset, len(self.rows), self.seed, epoch)]


def _permuted_index(offset: int, size: int, seed: int, epoch: int) -> int:
  if size < _MAX_STORED_PERMUTATION:
    return int(_permutation(size, seed, epoch)[offset])
  # Needs no memory, but up to 2 ** 16 / size steps where size is smaller.
  seed = (seed + epoch) % (1 << 32)
  return index_shuffle(offset, max_index=size - 1, seed=seed, rounds=4)


@functools.lru_cache(maxsize=1024)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
  order = np.random.default_rng((seed, epoch)).permutation(size)
  return order.astype(np.int32)


class MixtureSchedule(grain.transforms.DatasetSelectionMap):
  """Item index -> (dataset, index of the item in that dataset)."""

  def __init__(self, weights: tuple[float, ...], seed: int):
    total = sum(weights)
    self._units = tuple(
      max(1, round(weight / total * _RATE_UNITS)) for weight in weights
    )
    self._seed = seed

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int) -> tuple[int, int]:
    block, offset = divmod(index, _BLOCK)
    datasets, indices = _block_schedule(self._units, self._seed, block)
    return int(datasets[offset]), int(indices[offset])


@functools.lru_cache(maxsize=64)
def _block_schedule(
  units: tuple[int, ...], seed: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
  """int [_BLOCK] each: (dataset, index of the item in that dataset)."""
  starts = np.array(_dataset_counts(units, block * _BLOCK))
  counts = np.array(_dataset_counts(units, (block + 1) * _BLOCK)) - starts
  order = np.random.default_rng((seed, block)).permutation(_BLOCK)
  datasets = np.repeat(np.arange(len(units)), counts)[order]
  indices = np.empty(_BLOCK, np.int64)
  for i in np.flatnonzero(counts):
    indices[datasets == i] = starts[i] + np.arange(counts[i])
  return datasets, indices


def _dataset_counts(units: tuple[int, ...], items: int) -> list[int]:
  """Each dataset's count among the first `items` items, in exact integers.

  Each dataset takes its share of the items that the datasets before it left.
  So the counts add up to `items`, and none falls as `items` grows.
  """
  counts, items_left, units_left = [], items, sum(units)
  for unit in units:
    items_after = items_left * (units_left - unit) // units_left
    counts.append(items_left - items_after)
    items_left, units_left = items_after, units_left - unit
  return counts


def _dataset_seed(seed: int, name: str) -> int:
  """A dataset's seed, which does not depend on the other datasets."""
  sequence = np.random.SeedSequence((seed, zlib.crc32(name.encode())))
  return int(sequence.generate_state(1)[0] >> 1)
