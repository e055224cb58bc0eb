# SPDX-License-Identifier: Apache-2.0
"""Which examples share a batch: those of about the same lengths."""

import collections
from collections.abc import Sequence

Lengths = tuple[int, ...]
Bucket = tuple[Lengths, list[int]]


def buckets(
  lengths: Sequence[Lengths], least: Lengths, most: Lengths, batch_size: int
) -> list[Bucket]:
  """Batches of (padded lengths, places of at most `batch_size` examples).

  Lengths are rounded up to powers of two, so that there are few shapes to
  compile for. The widest come first: what does not fit into memory fails at
  once, and an estimate of the time that is left errs on the long side.

  Args:
    lengths: of each example, in tokens; for instance (inputs, targets).
    least: below which no length is told apart.
    most: the longest there are; lengths are not above them.
  """
  shapes = collections.defaultdict(list)
  for place, own in enumerate(lengths):
    sizes = zip(own, least, most, strict=True)
    shapes[tuple(round_up(*size) for size in sizes)].append(place)
  return [
    (shape, places[at : at + batch_size])
    for shape, places in sorted(shapes.items(), reverse=True)
    for at in range(0, len(places), batch_size)
  ]


def round_up(length: int, least: int, most: int) -> int:
  """The power of two that holds `length`, within [least, most]."""
  return min(max(least, 1 << (length - 1).bit_length()), most)


def whole(places: Sequence[int], rows: int) -> list[int]:
  """`rows` places: the last again and again where there are fewer."""
  return [*places] + [places[-1]] * (rows - len(places))
