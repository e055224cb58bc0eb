# SPDX-License-Identifier: Apache-2.0
"""The vote over optimal values."""

import pytest

from examples.or_agents.vote import agree, vote


def test_the_largest_group_wins():
  assert vote([7, 5, None, 5], [0, 6, 0, 6]) == (5, (1, 3))


@pytest.mark.parametrize(
  'a, b, result',
  [
    (0.0, 9e-5, True),
    (0.0, 2e-4, False),
    # Relative to the larger value: 1e-4 of 1e6 is 100.
    (1e6, 1e6 + 99, True),
    (1e6, 1e6 + 101, False),
    (-1e6, 1e6, False),
  ],
)
def test_values_agree_within_the_tolerance(a, b, result):
  assert agree(a, b) == agree(b, a) == result
  assert (len(vote([a, b], [0, 0])[1]) == 2) == result


def test_a_group_is_around_one_value_and_not_a_chain():
  # Neighbors agree at a tolerance of 0.1, the ends do not.
  assert vote([0.0, 0.09, 0.18, 0.27], [0] * 4, 0.1) == (0.09, (0, 1, 2))


def test_of_equal_groups_fewer_repairs_win_and_then_the_first():
  assert vote([1, 2, 1, 2], [0, 1, 3, 1]) == (2, (1, 3))
  assert vote([2, 1], [1, 1]) == (2, (0,))


def test_without_values_there_is_no_winner():
  assert vote([None, None], [0, 6]) == vote([], []) == (None, ())
