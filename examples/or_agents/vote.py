# SPDX-License-Identifier: Apache-2.0
"""The vote over optimal values: the largest group of equal values wins."""

from collections.abc import Sequence

TOLERANCE = 1e-4


def agree(a: float, b: float, tolerance: float = TOLERANCE) -> bool:
  """Whether two values differ by at most tolerance * max(1, |a|, |b|)."""
  return abs(a - b) <= tolerance * max(1, abs(a), abs(b))


def vote(
  values: Sequence[float | None],
  repairs: Sequence[int],
  tolerance: float = TOLERANCE,
) -> tuple[float | None, tuple[int, ...]]:
  """The value of the largest group of agreeing programs.

  A group is all values that agree with one of them, its center. Of groups of
  one size, the one with fewer repairs wins, then the one whose center comes
  first.

  Args:
    values: the optimal value of each program; None for a program without one,
      which has no vote.
    repairs: the number of repairs of each program.

  Returns:
    (value of the center, indices of the group), or (None, ()) if there is no
    value.
  """
  groups = {
    i: tuple(
      k
      for k, other_value in enumerate(values)
      if other_value is not None and agree(value, other_value, tolerance)
    )
    for i, value in enumerate(values)
    if value is not None
  }
  if not groups:
    return None, ()
  center = min(
    groups,
    key=lambda i: (-len(groups[i]), sum(repairs[k] for k in groups[i]), i),
  )
  return values[center], groups[center]
