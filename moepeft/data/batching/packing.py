# SPDX-License-Identifier: Apache-2.0
"""Packing: several examples in one row, with segment ids.

Krell et al., arXiv:2107.02027; segments and positions as in T5X and SeqIO.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def prepend(prefix_ids: Sequence[int], ids: Sequence[int]) -> Sequence[int]:
  """Puts a prefix before a text's ids: int32 [n].

  Args:
    prefix_ids: of `moepeft.peft.prefix.model_prefix_ids`; without any, the
      text's ids are returned as they are.
  """
  if not prefix_ids:
    return ids
  return np.concatenate([np.asarray(x, np.int32) for x in (prefix_ids, ids)])


def length_after_prefix(
  length: int, prefix_ids: Sequence[int], key: str
) -> int:
  """The tokens of a row that are left for the text after a prefix.

  Args:
    key: the config key of `length`, for the message.

  Raises:
    ValueError: fewer than two tokens are left: one, and EOS.
  """
  remaining = length - len(prefix_ids)
  if prefix_ids and remaining < 2:
    raise ValueError(
      f'a prompt of {len(prefix_ids)} tokens leaves no room for a text in '
      f'{key}={length}; raise it, or shorten the prompt (its option `length`)'
    )
  return remaining


class IdPair(NamedTuple):
  """A tokenized example of an encoder-decoder.

  Attributes:
    inputs, targets: ids.
    task: as in `decoder_only.Sample`.
  """

  inputs: Sequence[int]
  targets: Sequence[int]
  task: int = 0


def assign_bins(
  lengths: np.ndarray, capacity: Sequence[int]
) -> list[list[int]]:
  """Packs items into few bins: best fit, the longest item first.

  Args:
    lengths: int [items, k], of each of k sides; none exceeds its capacity.
    capacity: the length of a bin on each of the k sides.

  Returns:
    The indices of each bin's items.
  """
  free = np.empty((len(lengths), len(capacity)), np.int64)
  bins: list[list[int]] = []
  # An item's size is the larger of its shares of the sides' capacities.
  order = np.argsort(
    -np.max(lengths / np.asarray(capacity), axis=1), kind='stable'
  )
  for item in order:
    bins_free = free[: len(bins)]
    fits = np.all(bins_free >= lengths[item], axis=1)
    if fits.any():
      # Best fit on side 0: inputs are longer than targets, so most of the
      # padding is theirs.
      best_bin = int(np.argmin(np.where(fits, bins_free[:, 0], np.inf)))
    else:
      best_bin = len(bins)
      bins.append([])
      free[best_bin] = capacity
    bins[best_bin].append(int(item))
    free[best_bin] -= lengths[item]
  return bins


def shuffled_bins(
  lengths: np.ndarray, capacity: Sequence[int], rng: np.random.Generator
) -> list[list[int]]:
  """The bins of `assign_bins` in a random order."""
  bins = assign_bins(lengths, capacity)
  return [bins[i] for i in rng.permutation(len(bins))]


def pack_pairs(
  pairs: Sequence[IdPair],
  inputs_length: int,
  targets_length: int,
  bins: Sequence[Sequence[int]],
) -> dict[str, np.ndarray]:
  """Rows that hold several examples each.

  Args:
    bins: indices of each row's examples, which fit into it.

  Returns:
    The arrays of `seq2seq.pad_pairs`, and int32 <side>_segments (1, 2, ... in
    the order of a row's examples, 0 on padding) and <side>_positions (from 0
    in each segment) of the sides inputs [n, s] and targets [n, t]. Decoder
    inputs are shifted within each segment: each starts with padding's id, not
    with the last token of the segment before.
  """
  lengths = np.array([(len(x), len(y)) for x, y, *_ in pairs])
  batch = {}
  for side, length in ((0, inputs_length), (1, targets_length)):
    name = ('inputs', 'targets')[side]
    ids, segments, positions = np.zeros((3, len(bins), length), np.int32)
    for row, items in enumerate(bins):
      start = 0
      for segment, item in enumerate(items, 1):
        end = start + lengths[item, side]
        ids[row, start:end] = pairs[item][side]
        segments[row, start:end] = segment
        positions[row, start:end] = np.arange(end - start)
        start = end
    batch |= {
      name: ids,
      f'{name}_mask': segments > 0,
      f'{name}_segments': segments,
      f'{name}_positions': positions,
    }
  shifted = np.pad(batch['targets'][:, :-1], ((0, 0), (1, 0)))
  batch['decoder_inputs'] = np.where(batch['targets_positions'] > 0, shifted, 0)
  return batch
