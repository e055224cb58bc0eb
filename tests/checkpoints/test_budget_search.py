# SPDX-License-Identifier: Apache-2.0
"""Ranks and numbers of experts that are searched for a budget."""

import pytest

from moepeft.checkpoints.budget_search import Axis, search

RANK, EXPERTS = Axis(4, 1, 1_000), Axis(10, 2, 1_000)


def mixture(rank, experts):
  """Experts of 100 numbers a rank, with 40 of a router each."""
  return experts * (100 * rank + 40)


def rooted(rank, experts):
  """As the routers with sqrt(e) scores: not linear in the number of experts."""
  return 100 * rank * experts + 40 * round(experts**0.5)


def brute_force(function, target, tolerance):
  """The pair by the definition, tried one by one."""
  for distance in range(100):
    for experts in (10 - distance, 10 + distance):
      ranks = range(1, 100) if experts >= 2 else ()
      errors = {r: abs(function(r, experts) - target) for r in ranks}
      if errors and min(errors.values()) <= tolerance:
        return min(errors, key=errors.get), experts
  return None


def test_of_one_number_the_two_around_the_target_are_returned():
  numbers, reason = search(lambda rank: 100 * rank, 1_730, 0, [RANK])
  assert (numbers, reason) == ({(17,): 1_700, (18,): 1_800}, '')


@pytest.mark.parametrize(
  ('target', 'tolerance', 'pair'),
  [
    # 10 experts of rank 5 have 5,400.
    (5_420, 25, (5, 10)),
    # 10 of rank 6 have 6,400, and of rank 7 7,400; 9 of rank 7 6,660 and of
    # rank 8 7,560; 11 of rank 6 7,040.
    (7_050, 25, (6, 11)),
    # 9 of rank 8 have 7,560 and 11 of rank 7 8,140; the fewer are before the
    # more, where both are near enough.
    (7_850, 300, (8, 9)),
  ],
)
def test_the_number_of_experts_is_the_nearest_for_which_there_is_a_rank(
  target, tolerance, pair
):
  numbers, _ = search(mixture, target, tolerance, [RANK, EXPERTS])
  assert numbers == {pair: mixture(*pair)}
  assert brute_force(mixture, target, tolerance) == pair


@pytest.mark.parametrize('function', [mixture, rooted])
@pytest.mark.parametrize('target', range(3_050, 12_000, 401))
def test_the_pair_is_that_of_the_definition(function, target):
  pair = brute_force(function, target, 20)
  numbers, _ = search(function, target, 20, [RANK, EXPERTS])
  if pair:
    assert numbers == {pair: function(*pair)}
  else:
    assert all(abs(n - target) > 20 for n in numbers.values())


def test_a_bilinear_number_is_measured_at_a_few_points():
  points = []

  def measured(rank, experts):
    points.append((rank, experts))
    return mixture(rank, experts)

  # 13 experts of rank 9 have 12,220: eight numbers are tried, at two ranks or
  # more. The bilinear form needs five points, and each nearest pair one more.
  numbers, _ = search(measured, 12_220, 0, [RANK, EXPERTS])
  assert list(numbers) == [(9, 13)]
  assert len(points) <= 5 + 7


def test_a_number_of_experts_that_is_not_possible_is_left_out():
  def of_ten(rank, experts):
    if experts < 10:
      raise ValueError('ten are chosen')
    return mixture(rank, experts)

  # Nine of rank 8 would be the first, as above.
  assert search(of_ten, 7_850, 300, [RANK, EXPERTS])[0] == {(7, 11): 8_140}
  with pytest.raises(ValueError, match='ten are chosen'):
    search(of_ten, 7_850, 300, [RANK, Axis(9, 2, 1_000)])


def test_where_no_pair_is_near_enough_the_nearest_is_returned():
  # Two experts of rank 1 are the smallest.
  assert search(mixture, 100, 1, [RANK, EXPERTS]) == ({(1, 2): 280}, '')
