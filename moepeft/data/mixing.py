# SPDX-License-Identifier: Apache-2.0
"""Several datasets as one endless stream, at rates, each in shuffled epochs."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence

import grain
import numpy as np
from grain.experimental import index_shuffle

# Places in which the datasets' turns are shuffled, and their counts exact.
_ROUND = 1024
_UNITS = 1 << 40
_ENDLESS = 1 << 60
# Rows of which a permutation is held rather than computed.
_SMALL = 1 << 16


def mixing_rates(
  sizes: Mapping[str, int], cap: int = 0, temperature: float = 1.0
) -> dict[str, float]:
  """min(size, cap) ** (1 / temperature) of each dataset.

  Source: Raffel et al., arXiv:1910.10683, section 3.5.2: proportional (no cap,
  temperature 1), capped, temperature-scaled, and equal (temperature inf).

  Args:
    sizes: rows of each dataset.
    cap: the size above which datasets count alike; 0 for none.

  Raises:
    ValueError: the temperature is so low that a rate is too large to hold.
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
  """The endless dataset that draws from `datasets` at rates.

  Item i is a pure function of the arguments. A dataset's rows come in epochs,
  each a permutation of all of them, whatever stands beside the dataset; which
  dataset's turn it is, is shuffled within rounds that hold every rate exactly.

  Args:
    datasets: rows by name, none empty.
    weights: the rate of each, above zero; in any unit.
  """
  names = sorted(datasets)
  parts = [
    grain.MapDataset.source(ShuffledEpochs(datasets[name], _seed(seed, name)))
    for name in names
  ]
  if len(parts) == 1:
    return parts[0]
  turns = MixtureSchedule(tuple(weights[name] for name in names), seed)
  return grain.MapDataset.select_from_datasets(parts, turns)


def normalize(weights: dict[str, float]) -> dict[str, float]:
  """Weights that add up to one."""
  total = sum(weights.values())
  return {name: weight / total for name, weight in weights.items()}


@dataclasses.dataclass(frozen=True)
class ShuffledEpochs:
  """Rows without an end, in epochs that are permutations of them all."""

  rows: Sequence
  seed: int

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, place: int):
    epoch, offset = divmod(place, len(self.rows))
    return self.rows[_shuffled(offset, len(self.rows), self.seed, epoch)]


def _shuffled(offset: int, size: int, seed: int, epoch: int) -> int:
  if size < _SMALL:
    return int(_permutation(size, seed, epoch)[offset])
  # Holds no permutation; below 2 ** 16 it walks up to 2 ** 16 / size steps.
  seed = (seed + epoch) % (1 << 32)
  return index_shuffle(offset, max_index=size - 1, seed=seed, rounds=4)


@functools.lru_cache(maxsize=1024)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
  order = np.random.default_rng((seed, epoch)).permutation(size)
  return order.astype(np.int32)


class MixtureSchedule(grain.transforms.DatasetSelectionMap):
  """place -> (dataset, how many turns it had before)."""

  def __init__(self, weights: tuple[float, ...], seed: int):
    total = sum(weights)
    self._units = tuple(max(1, round(w / total * _UNITS)) for w in weights)
    self._seed = seed

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, place: int) -> tuple[int, int]:
    turn, offset = divmod(place, _ROUND)
    owners, keys = _round(self._units, self._seed, turn)
    return int(owners[offset]), int(keys[offset])


@functools.lru_cache(maxsize=64)
def _round(
  units: tuple[int, ...], seed: int, turn: int
) -> tuple[np.ndarray, np.ndarray]:
  """(whose turn, its count of turns before) at each place of a round."""
  counts_before = np.array(_counts(units, turn * _ROUND))
  counts_here = np.array(_counts(units, (turn + 1) * _ROUND)) - counts_before
  order = np.random.default_rng((seed, turn)).permutation(_ROUND)
  owners = np.repeat(np.arange(len(units)), counts_here)[order]
  keys = np.empty(_ROUND, np.int64)
  for owner in np.flatnonzero(counts_here):
    keys[owners == owner] = counts_before[owner] + np.arange(counts_here[owner])
  return owners, keys


def _counts(units: tuple[int, ...], places: int) -> list[int]:
  """Turns of each dataset in the first places: in whole numbers, so exact.

  Datasets take their share of what those before them left, so no count ever
  falls and their sum is `places`.
  """
  counts, left, rest = [], places, sum(units)
  for unit in units:
    after = left * (rest - unit) // rest
    counts.append(left - after)
    left, rest = after, rest - unit
  return counts


def _seed(seed: int, name: str) -> int:
  """A dataset's own seed, which does not depend on the others."""
  sequence = np.random.SeedSequence((seed, zlib.crc32(name.encode())))
  return int(sequence.generate_state(1)[0] >> 1)
