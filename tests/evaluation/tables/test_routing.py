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
