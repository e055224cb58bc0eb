# SPDX-License-Identifier: Apache-2.0
"""Metrics of steps as rows: counts of a batch, routers, alarms."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Routing
from moepeft.data.batching import decoder_only, seq2seq
from moepeft.moe import router_stats
from moepeft.runs import router_diagnosis
from moepeft.runs.history import History
from moepeft.runs.metrics_log import _replace_nonfinite
from moepeft.runs.trackers import scalars
from moepeft.training.metrics_logger import (
  MetricsLogger,
  _batch_size,
  routing_rows,
)


def test_a_token_of_a_decoder_is_counted_once():
  # 5 and 3 ids are 4 and 2 tokens that are read; the first prompt has 2 ids.
  rows = decoder_only.pad_samples(
    [decoder_only.make_sample([7, 8], [9, 7, 1]), SAMPLE], 5
  )
  examples, tokens, padding, untrained = _batch_size(rows)
  assert (examples, tokens) == (2, 6)
  assert padding == pytest.approx(1 - 6 / 10)
  # 3 and 2 of them are trained.
  assert untrained == pytest.approx(1 - 5 / 10)


def test_both_sides_of_a_pair_are_counted():
  rows = decoder_only.pad_samples([SAMPLE, SAMPLE, SAMPLE], 5)
  sides = {
    f'{s}_{k}': v for s in ('chosen', 'rejected') for k, v in rows.items()
  }
  # 3 rows of 2 tokens on either side.
  assert _batch_size(sides)[1] == 12


def test_pairs_of_packed_rows_are_counted():
  # A row of two, then a row of one.
  rows = decoder_only.pack_samples([SAMPLE, SAMPLE, SAMPLE], 5, [[0, 2], [1]])
  sides = {
    f'{s}_{k}': v for s in ('chosen', 'rejected') for k, v in rows.items()
  }
  # 3 pairs of 2 tokens on either side.
  assert _batch_size(sides)[:2] == (3, 12)


def test_inputs_and_targets_of_an_encoder_decoder_are_counted():
  rows = seq2seq.pad_pairs([[5, 6, 1]], [[7, 1]], 4, 4)
  assert _batch_size(rows)[:2] == (1, 5)


def test_a_likelihood_of_no_token_is_nan():
  rows = []
  tracker = types.SimpleNamespace(write=rows.append)
  progress = types.SimpleNamespace(update=lambda *arguments: {})
  logger = MetricsLogger([tracker], lambda step: 0.1, 0.5)
  no_tokens = {'tokens': 0, 'nll': 0.0, 'correct': 0}
  four_tokens = {'tokens': 4, 'nll': 6.0, 'correct': 1}
  for step, sums in enumerate((no_tokens, four_tokens), 1):
    metrics = {'loss': 1.0, 'router_loss': 0.0, 'gradient_norm': 1.0}
    metrics |= {'routing': {}} | sums
    logger.add(step, decoder_only.pad_samples([SAMPLE], 5), metrics)
  logger.flush(progress)
  assert np.isnan([rows[0]['nll'], rows[0]['token_accuracy']]).all()
  assert (rows[1]['nll'], rows[1]['token_accuracy']) == (1.5, 0.25)
  # Trackers and plots take these.
  assert 'train/nll' not in scalars(rows[0])
  json.dumps(_replace_nonfinite(rows[0]), allow_nan=False)
  history = History([_replace_nonfinite(rows[0])])
  history.write(rows[1])
  np.testing.assert_array_equal(history.curve('nll')[1], [np.nan, 1.5])


def test_a_router_that_is_collapsed_three_logs_in_a_row_raises_an_alarm():
  lines = []
  progress = types.SimpleNamespace(print_line=lines.append)
  logger = MetricsLogger([], lambda step: 0.1, 0.9)
  for sites in ('q', 'q', '', 'q', 'q', 'q', 'q'):
    logger._raise_alarms({f'{site}, layer 0': 'so' for site in sites}, progress)
    expected = [] if len(lines) == 0 else ['router alarm: q, layer 0: so']
    assert lines == expected
  # Not at the second log in a row, and once at the third.
  assert lines == ['router alarm: q, layer 0: so']


def test_a_collapsed_router_is_named_with_its_expert():
  sites = {
    'dense': {
      'weight': [[0.5, 0.5], [0.05, 0.95]],
      # ln 2 is 0.693; the second layer has 0.1 / 0.693 = 0.14 of it.
      'weight_entropy': [0.69, 0.1],
    },
    'sparse': {'tokens': [0.97, 0.02, 0.01], 'weight_entropy': 0.0},
    'below': {'tokens': [0.2, 0.8], 'weight_entropy': 0.0},
    # One expert has all of it, and must.
    'single': {'weight': [[1.0]], 'weight_entropy': [0.0]},
  }
  lines = router_diagnosis.collapsed_routers(sites, 0.9)
  assert list(lines) == ['dense, layer 1', 'sparse, layer 0']
  assert lines['dense, layer 1'].startswith('expert 1 has 95% of the weight')
  assert '0.14 of ln 2' in lines['dense, layer 1']
  assert lines['sparse, layer 0'].startswith('expert 0 gets 97% of the tokens')


def test_a_dense_router_with_one_expert_ahead_by_little_is_not_collapsed():
  # Of 100 tokens, 97 weight expert 2 the most: by a hundredth.
  ahead = np.tile([0.2475, 0.2475, 0.2575, 0.2475], (97, 1))
  behind = np.tile([0.2575, 0.2475, 0.2475, 0.2475], (3, 1))
  weights = jnp.asarray(np.concatenate([ahead, behind])[None], jnp.float32)
  sums = router_stats.router_stats(Routing(jnp.log(weights), weights), None)
  (site,) = routing_rows({'q': sums}).values()
  # 0.97 * 0.2575 + 0.03 * 0.2475
  assert site['weight'][2] == pytest.approx(0.2572)
  assert 'tokens' not in site and 'load' not in site
  assert site['weight_entropy'] / np.log(4) > 0.98
  # An alarm at a share of weight that any router has, were it not for entropy.
  assert router_diagnosis.collapsed_routers({'q': site}, 0.25) == {}


SAMPLE = decoder_only.Sample(np.array([7, 8, 1]), np.array([False, True, True]))
