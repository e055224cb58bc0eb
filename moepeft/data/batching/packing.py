# SPDX-License-Identifier: Apache-2.0
"""Packing: several examples in one row, with segment ids.

Krell et al., arXiv:2107.02027; segments and positions as in T5X and SeqIO.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moepeft.data.batching.router_inputs import NO_INPUTS, ExampleInputs


def prepend_prefix(
  prefix_ids: Sequence[int], ids: Sequence[int]
) -> Sequence[int]:
  """Returns the prefix and the ids as int32 [n], or `ids` without a prefix.

  Args:
    prefix_ids: the result of `moepeft.peft.prefix.model_prefix_ids`.
  """
  if not prefix_ids:
    return ids
  return np.concatenate([np.asarray(x, np.int32) for x in (prefix_ids, ids)])


def length_after_prefix(
  length: int, prefix_ids: Sequence[int], key: str
) -> int:
  """Returns the row length minus the prefix length.

  Args:
    key: the config key of `length`, for the message.

  Raises:
    ValueError: there is no room for one token and EOS after the prefix.
  """
  remaining = length - len(prefix_ids)
  if prefix_ids and remaining < 2:
    raise ValueError(
      f'a soft prompt of {len(prefix_ids)} tokens leaves no room for text in '
      f'{key}={length}; raise {key}, or lower the option `length` of the method'
    )
  return remaining


class TokenizedPair(NamedTuple):
  """A tokenized example of an encoder-decoder.

  Attributes:
    inputs, targets: token ids.
    routed_by: what routers read of the example.
  """

  inputs: Sequence[int]
  targets: Sequence[int]
  routed_by: ExampleInputs = NO_INPUTS


def best_fit_bins(
  lengths: np.ndarray, capacity: Sequence[int]
) -> list[list[int]]:
  """Packs items into few bins by best fit decreasing.

  Args:
    lengths: int [items, k], k lengths of each item: (inputs, targets), or one.
    capacity: the k lengths of a bin; no item exceeds them.

  Returns:
    The indices of each bin's items.
  """
  free = np.empty((len(lengths), len(capacity)), np.int64)
  bins: list[list[int]] = []
  # The largest item is the one that fills the largest fraction of a bin.
  order = np.argsort(
    -np.max(lengths / np.asarray(capacity), axis=1), kind='stable'
  )
  for item in order:
    bins_free = free[: len(bins)]
    fits = np.all(bins_free >= lengths[item], axis=1)
    if fits.any():
      # Only the inputs decide: they are longer than targets, so they cause
      # most of the padding.
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
  """The bins of `best_fit_bins` in a random order."""
  bins = best_fit_bins(lengths, capacity)
  return [bins[i] for i in rng.permutation(len(bins))]


def pack_pairs(
  pairs: Sequence[TokenizedPair],
  inputs_length: int,
  targets_length: int,
  bins: Sequence[Sequence[int]],
) -> dict[str, np.ndarray]:
  """Packs several examples into each row.

  Args:
    bins: the indices of each row's examples; the examples fit into the row.

  Returns:
    The arrays of `seq2seq.pad_pairs`, and int32 inputs_segments and
    inputs_positions [n, s], targets_segments and targets_positions [n, t].
    Segments are 1, 2, ... in the order of a row's examples and 0 on padding;
    positions start at 0 in each segment. The decoder inputs of a segment start
    with the padding id, not with the last token of the segment before.
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
