# SPDX-License-Identifier: Apache-2.0
"""The figures of a run's routers, by hand."""

import numpy as np
import pytest

from moepeft.evaluation.tables import routing

LN2, LN3 = np.log(2), np.log(3)


def test_figures_are_means_over_sites_and_layers_of_their_own_experts():
  sites = {
    # Two layers of three experts.
    'encoder/q': ('weight', [[0.5, 0.3, 0.2], [0.1, 0.9, 0.0]], [LN3, 0.0]),
    # A site of two experts, which is not in layers.
    'head': ('weight', [[0.6, 0.4]], LN2 / 2),
  }
  result = routing.summary(sites)
  # (1 + 0 + 1/2) / 3, (0.5 + 0.9 + 0.6) / 3.
  assert result.entropy == pytest.approx(0.5)
  assert result.max_shares == {'weight': (pytest.approx(2 / 3), 0.9)}


def test_weights_and_token_shares_are_never_one_figure():
  sites = {
    'a': ('weight', [[0.6, 0.4]], [LN2]),
    'b': ('tokens', [[1.0, 0.5, 0.5], [0.8, 0.7, 0.5]], [LN3, LN3]),
  }
  assert routing.summary(sites).max_shares == {
    'weight': (0.6, 0.6),
    'tokens': (pytest.approx(0.9), 1.0),
  }


def test_a_single_expert_is_no_routing():
  single = ('weight', [[1.0], [1.0]], [0.0, 0.0])
  assert routing.summary({'encoder/q': single}) is None
  assert routing.summary({}) is None
  two = ('weight', [[0.5, 0.5]], [LN2])
  result = routing.summary({'encoder/q': single, 'encoder/k': two})
  assert (result.entropy, result.max_shares) == (1.0, {'weight': (0.5, 0.5)})


def test_an_expert_with_less_than_a_hundredth_of_an_even_share_is_dead():
  sites = {
    # Even are 1/4, and 1/2 of the two experts that the second layer has.
    'a': (
      'weight',
      [[0.498, 0.499, 0.002, 0.001], [0.996, 0.004, np.nan, np.nan]],
      [LN2, LN2],
    ),
    # k is 2: even is 2/3. No token has the last expert.
    'b': ('tokens', [[1.0, 1.0, 0.0], [0.7, 0.65, 0.65]], [LN3, LN3]),
    # A router whose weights are all zero.
    'c': ('weight', [[0.0, 0.0]], [LN2]),
  }
  # 2 of 4, 1 of 2, 1 of 3, none of 3, 2 of 2.
  assert routing.summary(sites).dead == pytest.approx(6 / 14)


def test_largest_weights_do_not_show_dead_experts():
  sites = {'a': ('load', [[1.0, 0.0]], [LN2])}
  assert routing.summary(sites).dead is None
