# SPDX-License-Identifier: Apache-2.0
"""Batches of like lengths: every example once, in few shapes."""

from moepeft.data.batching.bucketing import make_buckets, repeat_last, round_up


def test_lengths_are_rounded_to_powers_of_two_within_bounds():
  lengths = [1, 16, 17, 32, 33, 100]
  actual = [round_up(length, 16, 100) for length in lengths]
  assert actual == [16, 16, 32, 32, 64, 100]
  # The longest wins over the least.
  assert round_up(3, 16, 7) == 7


def test_every_example_is_in_one_batch_that_it_fits():
  lengths = [(5, 3), (70, 3), (64, 16), (65, 20), (100, 1), (2, 17), (9, 9)]
  actual = make_buckets(lengths, (64, 16), (100, 20), 2)
  # Rounded: (64, 16), (100, 16), (64, 16), (100, 20), (100, 16), (64, 20),
  # (64, 16). From the greatest on, equal ones as they come, by twos.
  assert actual == [
    ((100, 20), [3, 1]),
    # The longest of each: inputs of the one, targets of the other.
    ((100, 20), [4, 5]),
    ((64, 16), [0, 2]),
    ((64, 16), [6]),
  ]


def test_only_the_last_batch_is_not_full():
  # 31 lengths of many shapes: 31 = 7 * 4 + 3.
  lengths = [(1 + 37 * i % 499, 1 + 53 * i % 127) for i in range(31)]
  actual = make_buckets(lengths, (16, 4), (512, 128), 4)
  assert [len(places) for _, places in actual] == [4] * 7 + [3]
  assert sorted(sum((places for _, places in actual), [])) == list(range(31))
  for shape, places in actual:
    assert all(
      n <= m for i in places for n, m in zip(lengths[i], shape, strict=True)
    )


def test_no_examples_are_no_batches():
  assert make_buckets([], (64,), (100,), 2) == []


def test_a_batch_is_made_whole_by_its_last_example():
  assert repeat_last([4, 2], 5) == [4, 2, 2, 2, 2]
  assert repeat_last([4, 2], 2) == [4, 2]
