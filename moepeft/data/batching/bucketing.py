# SPDX-License-Identifier: Apache-2.0
"""Length buckets: batches of examples of similar lengths."""

from collections.abc import Sequence

Lengths = tuple[int, ...]
Bucket = tuple[Lengths, list[int]]


def make_buckets(
  lengths: Sequence[Lengths],
  min_lengths: Lengths,
  max_lengths: Lengths,
  batch_size: int,
) -> list[Bucket]:
  """Batches of (padded lengths, indices of at most `batch_size` examples).

  Lengths are rounded up to powers of two, so that few shapes are compiled.
  Examples are sorted by them and fill one batch after the other, each padded
  to its longest example, so that only the last batch is not full. The longest
  come first: a batch that does not fit into memory fails at once, and an
  estimate of the time left is too long rather than too short.

  Args:
    lengths: each example's lengths in tokens, for instance (inputs, targets).
    min_lengths: the shortest lengths that a batch is padded to.
    max_lengths: the longest; no example exceeds them.
  """
  shapes = [
    tuple(
      round_up(*bounds)
      for bounds in zip(example, min_lengths, max_lengths, strict=True)
    )
    for example in lengths
  ]
  order = sorted(range(len(shapes)), key=lambda i: shapes[i], reverse=True)
  batches = []
  for start in range(0, len(order), batch_size):
    indices = order[start : start + batch_size]
    by_side = zip(*[shapes[i] for i in indices], strict=True)
    batches.append((tuple(map(max, by_side)), indices))
  return batches


def round_up(length: int, min_length: int, max_length: int) -> int:
  """`length` rounded up to a power of two, within the two bounds."""
  return min(max(min_length, 1 << (length - 1).bit_length()), max_length)


def repeat_last(indices: Sequence[int], rows: int) -> list[int]:
  """Repeats the last index until there are `rows` of them."""
  return [*indices] + [indices[-1]] * (rows - len(indices))
