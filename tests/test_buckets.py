# SPDX-License-Identifier: Apache-2.0
"""Batches of like lengths: every example once, in few shapes."""

from moepeft.data.buckets import buckets, round_up, whole


def test_lengths_are_rounded_to_powers_of_two_within_bounds():
  lengths = [1, 16, 17, 32, 33, 100]
  found = [round_up(length, 16, 100) for length in lengths]
  assert found == [16, 16, 32, 32, 64, 100]
  # The longest wins over the least.
  assert round_up(3, 16, 7) == 7


def test_every_example_is_in_one_batch_that_it_fits():
  lengths = [(5, 3), (70, 3), (64, 16), (65, 20), (100, 1), (2, 17), (9, 9)]
  found = buckets(lengths, (64, 16), (100, 20), 2)
  assert found == [
    ((100, 20), [3]),
    ((100, 16), [1, 4]),
    ((64, 20), [5]),
    ((64, 16), [0, 2]),
    ((64, 16), [6]),
  ]


def test_no_examples_are_no_batches():
  assert buckets([], (64,), (100,), 2) == []


def test_a_batch_is_made_whole_by_its_last_example():
  assert whole([4, 2], 5) == [4, 2, 2, 2, 2]
  assert whole([4, 2], 2) == [4, 2]
