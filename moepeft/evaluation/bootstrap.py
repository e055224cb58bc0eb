# SPDX-License-Identifier: Apache-2.0
"""Percentile bootstrap over examples and seeds, the same for every run.

Shapes have n examples and p prompts. Sources: Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13. Seeds are crossed with
examples, and the two are resampled independently, as in Owen, The pigeonhole
bootstrap, Annals of Applied Statistics 1(2), 2007.
"""

import functools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

DRAWS = 2000
_PERCENTILES = (2.5, 97.5)
# Entries of the array of resampling counts, 32 MB of float64.
_MAX_COUNTS = 1 << 22
# Entries of counts that are kept, 4 MB of int32.
_MAX_CACHED = 1 << 20


def means(
  each: np.ndarray,
  weights: np.ndarray,
  name: str = '',
  draws: int = DRAWS,
  seed: int = 0,
) -> np.ndarray:
  """Weighted means of resampled examples: float64 [draws, p].

  An example is drawn with all of its prompts. The resamples depend on n,
  `name`, `draws` and `seed` alone, so that two runs on the same examples can
  be compared draw by draw. The mean of a prompt without any weight in a draw
  is NaN.

  Args:
    each: float [n, p], an example's summed score in each prompt.
    weights: float [n, p]; 0 where a prompt lacks the example.
    name: the task's name; tasks are resampled independently.
    draws: the number of resamples.
  """
  n = len(each)
  resamples = _small_resamples if n * draws <= _MAX_CACHED else _resamples
  parts = []
  for counts in resamples(n, name, draws, seed):
    counts = counts.astype(np.float64)
    total, weight = counts @ each, counts @ weights
    with np.errstate(invalid='ignore', divide='ignore'):
      parts.append(np.where(weight > 0, total / weight, np.nan))
  return np.concatenate(parts)


def _resamples(
  n: int, name: str, draws: int, seed: int
) -> Iterator[np.ndarray]:
  """Counts of each example in each draw: [size, n] for parts of the draws."""
  rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
  chunk_size = max(1, _MAX_COUNTS // n)
  for start in range(0, draws, chunk_size):
    size = min(chunk_size, draws - start)
    yield rng.multinomial(n, np.full(n, 1 / n), size).astype(np.int32)


@functools.lru_cache(maxsize=64)
def _small_resamples(
  n: int, name: str, draws: int, seed: int
) -> tuple[np.ndarray, ...]:
  """`_resamples`, which takes most of a table's time, kept for the next run."""
  return tuple(_resamples(n, name, draws, seed))


def seed_weights(count: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
  """Weights of resampled seeds: float64 [draws, count]; rows sum to one.

  The resamples depend on `count`, so that the draws of two methods with as
  many seeds can be subtracted. With two seeds a draw is one seed, or with
  probability 1/2 their mean.
  """
  rng = np.random.default_rng((seed, zlib.crc32(b'seeds')))
  return rng.multinomial(count, np.full(count, 1 / count), draws) / count


def interval(values: np.ndarray) -> tuple[float, float]:
  """(low, high): the 95 % percentile interval of draws [draws].

  NaNs are ignored. Percentiles between two draws are interpolated linearly.
  """
  low, high = np.nanpercentile(values, _PERCENTILES)
  return float(low), float(high)


def table(
  idx: Sequence[Sequence[int]],
  each: Sequence[Sequence[float]],
  weights: Sequence[Sequence[float]],
) -> tuple[np.ndarray, np.ndarray]:
  """Aligns the scores of p prompts by example: (each, weights), [n, p] each.

  The n rows are the different `idx` of all prompts in ascending order. Entries
  of a prompt with equal `idx` are summed; missing entries are zero.

  Args:
    idx, each, weights: one sequence per prompt, equally long in a prompt.
  """
  all_idx = np.unique(
    np.concatenate([np.asarray(prompt_idx, np.int64) for prompt_idx in idx])
  )
  scores, totals = np.zeros((2, len(all_idx), len(idx)))
  prompts = zip(idx, each, weights, strict=True)
  for p, (prompt_idx, prompt_each, prompt_weights) in enumerate(prompts):
    rows = np.searchsorted(all_idx, np.asarray(prompt_idx, np.int64))
    np.add.at(scores[:, p], rows, np.asarray(prompt_each, np.float64))
    np.add.at(totals[:, p], rows, np.asarray(prompt_weights, np.float64))
  return scores, totals
