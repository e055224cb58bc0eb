# SPDX-License-Identifier: Apache-2.0
"""Intervals whose draws can be counted by hand."""

import numpy as np
import pytest

from moepeft.evaluation import bootstrap


def column(values):
  return np.array(values, np.float64)[:, None]


def test_two_examples_have_the_four_resamples_that_can_be_counted():
  # One right, one wrong: (r, r), (r, w), (w, r), (w, w) are as likely, so the
  # means 0, 1/2 and 1 have probabilities 1/4, 1/2 and 1/4.
  actual = bootstrap.means(column([1, 0]), column([1, 1]), draws=20_000)[:, 0]
  values, counts = np.unique(actual, return_counts=True)
  assert values.tolist() == [0, 0.5, 1]
  # A share's standard deviation is at most 0.5 / sqrt(20000) = 0.0035.
  np.testing.assert_allclose(counts / 20_000, [0.25, 0.5, 0.25], atol=0.015)
  # More than 2.5 % of the draws lie at each end.
  assert bootstrap.interval(actual) == (0, 1)


def test_weights_are_resampled_with_their_examples():
  # Losses of 6 nats in 2 tokens and 1 nat in 3: both twice, 12/4 or 2/6, or
  # one of each, 7/5. A mean of the examples' own means would have 5/3.
  actual = bootstrap.means(column([6, 1]), column([2, 3]), draws=200)
  np.testing.assert_allclose(np.unique(actual), [1 / 3, 7 / 5, 3])


def test_an_example_is_drawn_with_all_of_its_prompts():
  # Prompts that are each other's opposite: in every draw they add up to one.
  each = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 1]], np.float64)
  actual = bootstrap.means(each, np.ones((5, 2)), draws=100)
  np.testing.assert_allclose(actual.sum(axis=1), 1)
  assert np.ptp(actual[:, 0]) > 0


def test_where_all_are_right_the_interval_has_no_width():
  actual = bootstrap.means(column([1] * 13), column([1] * 13))
  assert bootstrap.interval(actual[:, 0]) == (1, 1)


def test_ends_are_percentiles_with_interpolation():
  # Of 0..80, place 0.025 x 80 = 2 and 0.975 x 80 = 78; of 0..10, place 0.25,
  # a quarter of the way from 0 to 1, and 9.75.
  assert bootstrap.interval(np.arange(81)[::-1]) == (2, 78)
  assert bootstrap.interval(np.arange(11.0)) == (0.25, 9.75)


def test_the_same_examples_are_resampled_whatever_was_measured():
  rng = np.random.default_rng(0)
  one, weights = rng.random((17, 2)), np.ones((17, 2))
  same = bootstrap.means(one, weights, 'cb', 50)
  np.testing.assert_array_equal(same, bootstrap.means(one, weights, 'cb', 50))
  # A figure that is larger by 1 everywhere is so in every draw.
  np.testing.assert_allclose(
    bootstrap.means(one + 1, weights, 'cb', 50), same + 1
  )
  # Other tasks and seeds are resampled by themselves.
  for other in (('rte', 50), ('cb', 50, 1)):
    assert not np.allclose(bootstrap.means(one, weights, *other), same)


def test_draws_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
  each, weights = column([1, 0, 1, 1, 0]), column([1] * 5)
  whole = bootstrap.means(each, weights, draws=101)
  monkeypatch.setattr(bootstrap, '_MAX_COUNTS', 5 * 7)
  np.testing.assert_array_equal(
    bootstrap.means(each, weights, draws=101), whole
  )


def test_a_table_lines_examples_up_by_idx():
  each, weights = bootstrap.table(
    [[7, 3], [3, 11, 3]], [[1, 0], [1, 1, 0]], [[1, 1], [1, 1, 1]]
  )
  # Rows 3, 7, 11: the first prompt lacks 11, the second 7; 3 counts twice.
  assert each.tolist() == [[0, 1], [1, 0], [0, 1]]
  assert weights.tolist() == [[1, 2], [1, 0], [0, 1]]


def test_a_draw_that_lacks_a_prompt_says_nothing_of_it():
  # The second prompt has the first example only: absent from
  # one draw of four.
  each = weights = np.array([[1.0, 1], [1, 0]])
  actual = bootstrap.means(each, weights, draws=400)
  assert not np.isnan(actual[:, 0]).any()
  assert np.isnan(actual[:, 1]).mean() == pytest.approx(0.25, abs=0.1)
  assert bootstrap.interval(actual[:, 1]) == (1, 1)
