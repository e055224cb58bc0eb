# SPDX-License-Identifier: Apache-2.0
"""Searches whole numbers, such as ranks and numbers of experts, for a budget.

Counts of parameters and FLOPs increase with each of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Axis:
  """An option's whole numbers.

  Attributes:
    start: the method's own, which is possible.
    least, most: the bounds.
  """

  start: int
  least: int
  most: int

  def outward(self) -> Iterator[int]:
    """All numbers, by their distance from the start, the smaller one first."""
    yield self.start
    for distance in range(1, self.most - self.least + 1):
      yield from (self.start - distance, self.start + distance)


def search(
  function: Callable[..., float],
  target: float,
  tolerance: float,
  axes: Sequence[Axis],
) -> tuple[dict[tuple[int, ...], float], str]:
  """({values: number}, why others are not possible, or '').

  Of one axis, the last value at or below the target and the next. Of two, the
  numbers of the second are tried outward from its start and solved for the
  first; the result is the first pair within the tolerance, or the nearest pair.

  Args:
    function: values -> number, or a ValueError where they are not possible.
    tolerance: the largest distance from the target.

  Raises:
    ValueError: the method is not possible with its own values.
  """
  solved = axes[0]
  if len(axes) == 1:
    line = _Line(function, solved.least, solved.most)
    numbers = line.around(target, solved.start)
    return {(value,): n for value, n in numbers.items()}, line.reason
  walked = axes[1]
  function = functools.cache(function)
  estimate = _bilinear(function, solved.start, walked.start) or function
  least, most, start = walked.least, walked.most, solved.start
  best, distance = (solved.start, walked.start), math.inf
  for value in walked.outward():
    if not least <= value <= most:
      continue
    line = _Line(lambda n, v=value: estimate(n, v), solved.least, solved.most)
    try:
      numbers = line.around(target, start)
      start = min(numbers, key=lambda n: abs(numbers[n] - target))
      error = abs(numbers[start] - target)
      if error < distance and abs(function(start, value) - target) == error:
        best, distance = (start, value), error
    except ValueError:
      # As two experts are for a router that chooses three.
      continue
    if distance <= tolerance:
      break
    # Where all are above the target, more are too; where all are below it,
    # fewer are too.
    if min(numbers.values()) > target:
      most = value
    if max(numbers.values()) < target:
      least = value
  return {best: function(*best)}, ''


def _bilinear(
  function: Callable[[int, int], float], x: int, y: int
) -> Callable[[int, int], float] | None:
  """The bilinear function through four points, which costs nothing to compute.

  Parameters of adapters and routers are bilinear in a rank and a number of
  experts, but for few routers.

  Returns:
    None where a fifth point shows another function, or a point is not possible.

  Raises:
    ValueError: the point (x, y) is not possible.
  """
  corner = function(x, y)
  try:
    slope_x = function(x + 1, y) - corner
    slope_y = function(x, y + 1) - corner
    mixed = function(x + 1, y + 1) - corner - slope_x - slope_y
    control = function(2 * x + 3, 2 * y + 3)
  except ValueError:
    return None

  def estimate(p: int, q: int) -> float:
    i, j = p - x, q - y
    return corner + slope_x * i + slope_y * j + mixed * i * j

  return estimate if estimate(2 * x + 3, 2 * y + 3) == control else None


@dataclasses.dataclass
class _Line:
  """The two whole numbers around the solution of an increasing function.

  Attributes:
    function: value -> number, or a ValueError where the value is not possible.
    least, most: the bounds of the values.
    reason: why the values beyond those of the result are not possible.
  """

  function: Callable[[int], float]
  least: int
  most: int
  reason: str = ''

  def around(self, target: float, start: int) -> dict[int, float]:
    """{value: number} of the last value at or below a target and the next.

    One of them is missing where it is not possible.

    Args:
      start: a possible value.
    """
    numbers = {}
    low, high = self.least - 1, self.most + 1
    guess = min(max(start, self.least), self.most)
    while high - low > 1:
      value = min(max(guess, low + 1), high - 1)
      try:
        numbers[value] = self.function(value)
      except ValueError as error:
        if not numbers:
          raise
        self.reason = f' ({value} is not possible: {error})'
        low, high = (value, high) if value < min(numbers) else (low, value)
        guess = value + 1 if value == low else value - 1
        continue
      if numbers[value] <= target:
        low = value
      else:
        high = value
      guess = self._next(numbers, target, low, high)
    return {v: numbers[v] for v in (low, high) if v in numbers}

  def _next(self, numbers, target, low, high) -> int:
    """A secant through the two values whose numbers are nearest to the target.

    Counts are linear in a rank or a number of experts, or nearly so; halves of
    the interval where they are not.
    """
    if len(numbers) == 1:
      return low + 1 if low in numbers else high - 1
    a, b = sorted(numbers, key=lambda value: abs(numbers[value] - target))[:2]
    slope = (numbers[a] - numbers[b]) / (a - b)
    if slope <= 0 or len(numbers) % 4 == 0:
      return (low + high) // 2
    return a + math.floor((target - numbers[a]) / slope)
