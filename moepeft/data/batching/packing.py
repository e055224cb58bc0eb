# SPDX-License-Identifier: Apache-2.0
"""Packing: many examples in one row, kept apart by segments.

Krell et al., arXiv:2107.02027; segments and positions as in T5X and SeqIO.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def prepend(prefix_ids: Sequence[int], ids: Sequence[int]) -> Sequence[int]:
  """A text behind its prefix: int32 [n]; the text itself without a prefix.

  Args:
    prefix_ids: of `moepeft.peft.prefix.model_prefix_ids`.
  """
  if not prefix_ids:
    return ids
  return np.concatenate([np.asarray(x, np.int32) for x in (prefix_ids, ids)])


def length_after_prefix(
  length: int, prefix_ids: Sequence[int], key: str
) -> int:
  """The tokens of a row that are left for the text behind a prefix.

  Args:
    key: that sets the length.

  Raises:
    ValueError: no token, and its end.
  """
  left = length - len(prefix_ids)
  if prefix_ids and left < 2:
    raise ValueError(
      f'a prompt of {len(prefix_ids)} tokens leaves no room for a text in '
      f'{key}={length}; raise it, or shorten the prompt (its option `length`)'
    )
  return left


class IdPair(NamedTuple):
  """An encoded example of an encoder-decoder.

  Attributes:
    inputs, targets: their ids.
    task: as in `decoder_only.Sample`.
  """

  inputs: Sequence[int]
  targets: Sequence[int]
  task: int = 0


def assign_bins(
  lengths: np.ndarray, capacity: Sequence[int]
) -> list[list[int]]:
  """Places items into few bins: best fit, the longest item first.

  Args:
    lengths: int [items, k], of each side; none above its capacity.
    capacity: of a bin, for each of the k sides.

  Returns:
    The items of each bin.
  """
  free = np.empty((len(lengths), len(capacity)), np.int64)
  bins: list[list[int]] = []
  # Whichever side fills its room more decides how large an item is.
  order = np.argsort(
    -np.max(lengths / np.asarray(capacity), axis=1), kind='stable'
  )
  for item in order:
    open_bins = free[: len(bins)]
    fits = np.all(open_bins >= lengths[item], axis=1)
    if fits.any():
      # Of the first side: inputs are longer than targets, so theirs is the
      # padding that costs.
      left = open_bins[:, 0]
      chosen = int(np.argmin(np.where(fits, left, np.inf)))
    else:
      chosen = len(bins)
      bins.append([])
      free[chosen] = capacity
    bins[chosen].append(int(item))
    free[chosen] -= lengths[item]
  return bins


def shuffled_bins(
  lengths: np.ndarray, capacity: Sequence[int], rng: np.random.Generator
) -> list[list[int]]:
  """`bins` in a random order."""
  bins = assign_bins(lengths, capacity)
  return [bins[i] for i in rng.permutation(len(bins))]


def pack_pairs(
  pairs: Sequence[IdPair],
  inputs_length: int,
  targets_length: int,
  rows: Sequence[Sequence[int]],
) -> dict[str, np.ndarray]:
  """Rows that hold several examples each.

  Args:
    rows: the examples of each row, that fit.

  Returns:
    As `batching.seq2seq`, and int32 <side>_segments (1, 2, ... in the order of
    a row's examples, 0 on padding) and <side>_positions (from 0 in each) for
    the sides inputs [n, s] and targets [n, t]. Decoder inputs are shifted
    within each example, so none begins with the last token of another.
  """
  lengths = np.array([(len(x), len(y)) for x, y, *_ in pairs])
  out = {}
  for side, length in ((0, inputs_length), (1, targets_length)):
    name = ('inputs', 'targets')[side]
    ids, segments, positions = np.zeros((3, len(rows), length), np.int32)
    for row, items in enumerate(rows):
      at = 0
      for segment, item in enumerate(items, 1):
        end = at + lengths[item, side]
        ids[row, at:end] = pairs[item][side]
        segments[row, at:end] = segment
        positions[row, at:end] = np.arange(end - at)
        at = end
    out |= {
      name: ids,
      f'{name}_mask': segments > 0,
      f'{name}_segments': segments,
      f'{name}_positions': positions,
    }
  shifted = np.pad(out['targets'][:, :-1], ((0, 0), (1, 0)))
  out['decoder_inputs'] = np.where(out['targets_positions'] > 0, shifted, 0)
  return out
