# SPDX-License-Identifier: Apache-2.0
"""Span corruption: T5's objective (arXiv:1910.10683, section 3.1.4).

Lengths and masks follow SeqIO's `random_spans_helper` and
`random_spans_noise_mask`: non-noise and noise spans alternate, a non-noise span
first. Their lengths are uniform among all that have the right sum.
"""

from collections.abc import Callable, Sequence

import numpy as np


def counts(
  length: int, noise_density: float, mean_span: float
) -> tuple[int, int]:
  """(noise tokens, noise spans) in a text of `length` tokens, at least 2."""
  noise = min(max(int(np.round(length * noise_density)), 1), length - 1)
  spans = max(int(np.round(noise / mean_span)), 1)
  return noise, min(spans, noise, length - noise)


def sizes(
  length: int, noise_density: float, mean_span: float
) -> tuple[int, int]:
  """(number of inputs, of targets) for `length` tokens.

  Both include sentinels and EOS.
  """
  noise, spans = counts(length, noise_density, mean_span)
  return length - noise + spans + 1, noise + spans + 1


def max_length(
  fits: Callable[[int, int], bool], noise_density: float, mean_span: float
) -> int:
  """The largest number of tokens whose inputs and targets fit.

  Raises:
    ValueError: two tokens, the minimum, do not fit.
  """
  if not fits(*sizes(2, noise_density, mean_span)):
    raise ValueError(
      'span corruption needs at least two tokens, and they do not fit; raise '
      'the lengths of config.data'
    )
  length = 2
  while fits(*sizes(length + 1, noise_density, mean_span)):
    length += 1
  return length


def noise_mask(
  length: int,
  noise_density: float,
  mean_span: float,
  rng: np.random.Generator,
) -> np.ndarray:
  """bool [length], True on noise tokens; the first token is not noise."""
  noise, spans = counts(length, noise_density, mean_span)
  clean_lengths = _split_total(length - noise, spans, rng)
  noise_lengths = _split_total(noise, spans, rng)
  lengths = np.stack([clean_lengths, noise_lengths], axis=1).reshape(-1)
  return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _split_total(
  total: int, count: int, rng: np.random.Generator
) -> np.ndarray:
  """Draws `count` lengths of at least 1 that sum to `total`."""
  cuts = rng.choice(total - 1, count - 1, replace=False) + 1
  return np.diff(np.concatenate([[0], np.sort(cuts), [total]])).astype(int)


def corrupt(
  ids: np.ndarray, is_noise: np.ndarray, sentinels: Sequence[int], eos: int
) -> tuple[np.ndarray, np.ndarray]:
  """(inputs, targets), int32, each with EOS.

  A sentinel replaces each noise span in the inputs, and each other span in the
  targets. Both use the sentinels in order, from sentinels[0].

  Raises:
    ValueError: there are more spans than sentinels.
  """
  sides = []
  for replaced in (is_noise, ~is_noise):
    is_start = replaced & ~np.concatenate([[False], replaced[:-1]])
    count = int(is_start.sum())
    if count > len(sentinels):
      raise ValueError(
        f'{count} spans need as many sentinels, and the vocabulary has '
        f'{len(sentinels)}; lower config.data.noise_density, raise '
        'config.data.mean_noise_span_length or shorten the rows'
      )
    side = np.array(ids, np.int32)
    side[is_start] = np.asarray(sentinels[:count], np.int32)
    sides.append(np.append(side[is_start | ~replaced], np.int32(eos)))
  return sides[0], sides[1]


def restore(
  inputs: np.ndarray, targets: np.ndarray, sentinels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """(ids, is_noise); the inverse of `corrupt`."""
  sentinel_ids = np.asarray(sentinels)
  clean_spans, noise_spans = (
    np.split(side[:-1], np.flatnonzero(np.isin(side[:-1], sentinel_ids)))
    for side in map(np.asarray, (inputs, targets))
  )
  # A sentinel precedes every span but the first of the inputs. The targets
  # start with a sentinel, so their first part is empty.
  clean_spans = [clean_spans[0], *(span[1:] for span in clean_spans[1:])]
  noise_spans = [*(span[1:] for span in noise_spans[1:]), []]
  pairs = zip(clean_spans, noise_spans, strict=False)
  spans = [span for pair in pairs for span in pair]
  ids = np.concatenate(spans).astype(np.int32)
  return ids, np.repeat(np.arange(len(spans)) % 2 == 1, [*map(len, spans)])


def lengths(is_noise: np.ndarray) -> list[int]:
  """The length of each run of True."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], is_noise, [0]])))
  return (edges[1::2] - edges[::2]).tolist()
