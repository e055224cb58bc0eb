# SPDX-License-Identifier: Apache-2.0
"""What a run's routers come to, by hand."""

import numpy as np
import pytest

from moepeft.scoring import routing

LN2, LN3 = np.log(2), np.log(3)


def test_figures_are_means_over_sites_and_layers_of_their_own_experts():
  row = {
    'step': 7,
    'routing': {
      # Two layers of three experts.
      'encoder/q': {
        'load': [[0.5, 0.3, 0.2], [0.1, 0.9, 0.0]],
        'entropy': [LN3, 0.0],
      },
      # A site of two experts, which is not in layers.
      'head': {'load': [0.6, 0.4], 'entropy': LN2 / 2},
    },
  }
  found = routing.summary(row)
  # (1 + 0 + 1/2) / 3, (0.5 + 0.9 + 0.6) / 3.
  assert found.entropy == pytest.approx(0.5)
  assert found.top == pytest.approx(2 / 3)
  assert found.worst == 0.9


def test_a_single_expert_is_no_routing():
  site = {'load': [[1.0], [1.0]], 'entropy': [0.0, 0.0]}
  assert routing.summary({'routing': {'encoder/q': site}}) is None
  two = {'load': [[0.5, 0.5]], 'entropy': [LN2]}
  found = routing.summary({'routing': {'encoder/q': site, 'encoder/k': two}})
  assert (found.entropy, found.top, found.worst) == (1.0, 0.5, 0.5)


def test_the_latest_row_that_tells_of_routers_counts():
  def row(step, load):
    site = {'load': [[load, 1 - load]], 'entropy': [0.0]}
    return {'step': step, 'routing': {'head': site}}

  rows = [row(1, 0.6), row(2, 0.8), {'step': 3}, {'step': 4, 'routing': {}}]
  assert routing.latest(iter(rows)).top == 0.8
  assert routing.latest([{'step': 1}]) is None
