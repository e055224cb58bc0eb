# SPDX-License-Identifier: Apache-2.0
"""What is counted of a step's batch."""

import numpy as np
import pytest

from moepeft.data import batching, causal
from moepeft.report import _sums


def test_a_token_of_a_decoder_is_counted_once():
  # 5 and 3 ids are 4 and 2 tokens that are read; the first prompt has 2 ids.
  rows = causal.padded([causal.sample([7, 8], [9, 7, 1]), ONE], 5)
  examples, tokens, padding, untrained = _sums(rows)
  assert (examples, tokens) == (2, 6)
  assert padding == pytest.approx(1 - 6 / 10)
  # 3 and 2 of them are trained.
  assert untrained == pytest.approx(1 - 5 / 10)


def test_both_sides_of_a_pair_are_counted():
  rows = causal.padded([ONE, ONE, ONE], 5)
  sides = {
    f'{s}_{k}': v for s in ('chosen', 'rejected') for k, v in rows.items()
  }
  # 3 rows of 2 tokens on either side.
  assert _sums(sides)[1] == 12


def test_inputs_and_targets_of_an_encoder_decoder_are_counted():
  rows = batching.seq2seq([[5, 6, 1]], [[7, 1]], 4, 4)
  assert _sums(rows)[:2] == (1, 5)


ONE = causal.Sample(np.array([7, 8, 1]), np.array([False, True, True]))
