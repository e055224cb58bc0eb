# SPDX-License-Identifier: Apache-2.0
"""Buckets: batches of examples of about the same lengths."""

from collections.abc import Sequence

Lengths = tuple[int, ...]
Bucket = tuple[Lengths, list[int]]


def buckets(
  lengths: Sequence[Lengths], least: Lengths, most: Lengths, batch_size: int
) -> list[Bucket]:
  """Batches of (padded lengths, places of at most `batch_size` examples).

  Lengths are rounded up to powers of two, so that there are few shapes to
  compile for; examples in order of them fill one batch after the other, padded
  to the longest of its own, so that only the last is not full. The widest come
  first: what does not fit into memory fails at once, and an estimate of the
  time that is left errs on the long side.

  Args:
    lengths: of each example, in tokens; for instance (inputs, targets).
    least: below which no length is told apart.
    most: the longest there are; lengths are not above them.
  """
  shapes = [
    tuple(
      round_up(*size) for size in zip(size_of_example, least, most, strict=True)
    )
    for size_of_example in lengths
  ]
  order = sorted(range(len(shapes)), key=lambda i: shapes[i], reverse=True)
  batches = []
  for at in range(0, len(order), batch_size):
    places = order[at : at + batch_size]
    columns = zip(*[shapes[i] for i in places], strict=True)
    batches.append((tuple(map(max, columns)), places))
  return batches


def round_up(length: int, least: int, most: int) -> int:
  """The power of two that holds `length`, within [least, most]."""
  return min(max(least, 1 << (length - 1).bit_length()), most)


def repeat_last(places: Sequence[int], rows: int) -> list[int]:
  """`rows` places: the last again and again where there are fewer."""
  return [*places] + [places[-1]] * (rows - len(places))
