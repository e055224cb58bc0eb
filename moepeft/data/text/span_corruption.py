# SPDX-License-Identifier: Apache-2.0
"""Span corruption: T5's objective (arXiv:1910.10683, section 3.1.4).

Lengths and masks follow the definitions of SeqIO's `random_spans_helper` and
`random_spans_noise_mask`: spans of hidden and of shown tokens alternate, a
shown one first, their lengths drawn evenly among those that sum up.
"""

from collections.abc import Callable, Sequence

import numpy as np


def counts(length: int, noise: float, span: float) -> tuple[int, int]:
  """(hidden tokens, spans) of a text of `length` tokens, at least 2."""
  hidden = min(max(int(np.round(length * noise)), 1), length - 1)
  spans = max(int(np.round(hidden / span)), 1)
  return hidden, min(spans, hidden, length - hidden)


def sizes(length: int, noise: float, span: float) -> tuple[int, int]:
  """(inputs, targets) that it becomes, each with its sentinels and EOS."""
  hidden, spans = counts(length, noise, span)
  return length - hidden + spans + 1, hidden + spans + 1


def max_length(
  fits: Callable[[int, int], bool], noise: float, span: float
) -> int:
  """The most tokens whose inputs and targets fit.

  Raises:
    ValueError: not even two do.
  """
  if not fits(*sizes(2, noise, span)):
    raise ValueError(
      'not even two tokens fit where spans are hidden; raise the lengths of '
      'config.data'
    )
  length = 2
  while fits(*sizes(length + 1, noise, span)):
    length += 1
  return length


def noise_mask(
  length: int, noise: float, span: float, rng: np.random.Generator
) -> np.ndarray:
  """bool [length], True on hidden tokens; the first is shown."""
  hidden, spans = counts(length, noise, span)
  shown = _parts(length - hidden, spans, rng)
  lengths = np.stack([shown, _parts(hidden, spans, rng)], axis=1).reshape(-1)
  return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """`parts` lengths of at least 1 that sum to `total`."""
  cuts = rng.choice(total - 1, parts - 1, replace=False) + 1
  return np.diff(np.concatenate([[0], np.sort(cuts), [total]])).astype(int)


def corrupt(
  ids: np.ndarray, hidden: np.ndarray, sentinels: Sequence[int], eos: int
) -> tuple[np.ndarray, np.ndarray]:
  """(inputs, targets), int32, each with EOS.

  In the inputs a sentinel stands for each hidden span; in the targets one for
  each shown span. The first of a side is sentinels[0], and so on.

  Raises:
    ValueError: there are more spans than sentinels.
  """
  sides = []
  for replaced in (hidden, ~hidden):
    begins = replaced & ~np.concatenate([[False], replaced[:-1]])
    count = int(begins.sum())
    if count > len(sentinels):
      raise ValueError(
        f'{count} spans need as many sentinels, and the vocabulary has '
        f'{len(sentinels)}; lower config.data.noise_density, raise '
        'config.data.mean_noise_span_length or '
        'shorten the rows'
      )
    out = np.array(ids, np.int32)
    out[begins] = np.asarray(sentinels[:count], np.int32)
    sides.append(np.append(out[begins | ~replaced], np.int32(eos)))
  return sides[0], sides[1]


def restore(
  inputs: np.ndarray, targets: np.ndarray, sentinels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """(ids, hidden): what `corrupt` was given, of what it made."""
  sentinel_ids = np.asarray(sentinels)
  shown, spans = (
    np.split(side[:-1], np.flatnonzero(np.isin(side[:-1], sentinel_ids)))
    for side in map(np.asarray, (inputs, targets))
  )
  # Shown spans after the first begin with a sentinel, as all hidden ones do;
  # no target stands before the first.
  shown = [shown[0], *(part[1:] for part in shown[1:])]
  spans = [part[1:] for part in spans[1:]]
  parts = [
    part for pair in zip(shown, [*spans, []], strict=False) for part in pair
  ]
  sizes = [len(part) for part in parts]
  ids = np.concatenate(parts).astype(np.int32)
  return ids, np.repeat(np.arange(len(parts)) % 2 == 1, sizes)


def lengths(hidden: np.ndarray) -> list[int]:
  """The length of each run of True."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden, [0]])))
  return (edges[1::2] - edges[::2]).tolist()
