# SPDX-License-Identifier: Apache-2.0
"""Percentile bootstrap over examples and seeds, the same for every run.

Letters: n examples, p prompts. Sources: Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13; for seeds, which are crossed with the
examples, Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2),
2007: each of the two is resampled by itself.
"""

import zlib
from collections.abc import Sequence

import numpy as np

DRAWS = 2000
# Per cent of the draws between the ends of an interval.
_PERCENT = (2.5, 97.5)
# Cells of the table of counts that are held at once: 32 MB.
_CELLS = 1 << 22


def means(
  each: np.ndarray,
  weights: np.ndarray,
  name: str = '',
  draws: int = DRAWS,
  seed: int = 0,
) -> np.ndarray:
  """Weighted means of resampled examples: float64 [draws, p].

  An example is drawn with all of its prompts, since they share it. The
  resamples depend on n, `name`, `draws` and `seed` alone, so two runs on the
  same examples can be compared draw by draw. A draw without any weight for a
  prompt is NaN there.

  Args:
    each: float [n, p], the sum of an example's figure in each prompt.
    weights: float [n, p]; 0 where a prompt lacks the example.
    name: of the task; tasks are resampled independently.
  """
  n = len(each)
  rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
  at_once = max(1, _CELLS // n)
  parts = []
  for start in range(0, draws, at_once):
    size = min(at_once, draws - start)
    counts = rng.multinomial(n, np.full(n, 1 / n), size).astype(np.float64)
    total, weight = counts @ each, counts @ weights
    with np.errstate(invalid='ignore', divide='ignore'):
      parts.append(np.where(weight > 0, total / weight, np.nan))
  return np.concatenate(parts)


def seed_weights(count: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
  """Weights of resampled seeds: float64 [draws, count]; rows sum to one.

  Rows with as many seeds get the same resamples, so that draws of theirs can
  be subtracted. Of two seeds a draw is one of them, or with probability 1/2
  their mean.
  """
  rng = np.random.default_rng((seed, zlib.crc32(b'seeds')))
  return rng.multinomial(count, np.full(count, 1 / count), draws) / count


def interval(values: np.ndarray) -> tuple[float, float]:
  """The 95 % percentile interval of draws [draws]; NaNs are passed over.

  Percentiles between two draws are interpolated linearly.
  """
  low, high = np.nanpercentile(values, _PERCENT)
  return float(low), float(high)


def table(
  idx: Sequence[Sequence[int]],
  each: Sequence[Sequence[float]],
  weights: Sequence[Sequence[float]],
) -> tuple[np.ndarray, np.ndarray]:
  """Figures of p prompts side by side: each [n, p] and weights [n, p].

  The rows are the different idx of all prompts in ascending order. What a
  prompt has of one idx is added up; what it lacks is zero.

  Args:
    idx, each, weights: of every prompt, of equal lengths within a prompt.
  """
  keys = np.unique(
    np.concatenate([np.asarray(numbers, np.int64) for numbers in idx])
  )
  sums = np.zeros((2, len(keys), len(idx)))
  for p, numbers in enumerate(zip(idx, each, weights, strict=True)):
    rows = np.searchsorted(keys, np.asarray(numbers[0], np.int64))
    np.add.at(sums[0, :, p], rows, np.asarray(numbers[1], np.float64))
    np.add.at(sums[1, :, p], rows, np.asarray(numbers[2], np.float64))
  return sums[0], sums[1]
