# SPDX-License-Identifier: Apache-2.0
"""What is counted of a step's batch."""

import json
import types

import numpy as np
import pytest

from moepeft.data.batching import decoder_only, seq2seq
from moepeft.runs.history import History
from moepeft.runs.metrics_log import _finite
from moepeft.runs.trackers import scalars
from moepeft.training.metrics_logger import Report, _sums


def test_a_token_of_a_decoder_is_counted_once():
  # 5 and 3 ids are 4 and 2 tokens that are read; the first prompt has 2 ids.
  rows = decoder_only.pad_samples(
    [decoder_only.make_sample([7, 8], [9, 7, 1]), ONE], 5
  )
  examples, tokens, padding, untrained = _sums(rows)
  assert (examples, tokens) == (2, 6)
  assert padding == pytest.approx(1 - 6 / 10)
  # 3 and 2 of them are trained.
  assert untrained == pytest.approx(1 - 5 / 10)


def test_both_sides_of_a_pair_are_counted():
  rows = decoder_only.pad_samples([ONE, ONE, ONE], 5)
  sides = {
    f'{s}_{k}': v for s in ('chosen', 'rejected') for k, v in rows.items()
  }
  # 3 rows of 2 tokens on either side.
  assert _sums(sides)[1] == 12


def test_pairs_of_packed_rows_are_counted():
  # A row of two, then a row of one.
  rows = decoder_only.pack_samples([ONE, ONE, ONE], 5, [[0, 2], [1]])
  sides = {
    f'{s}_{k}': v for s in ('chosen', 'rejected') for k, v in rows.items()
  }
  # 3 pairs of 2 tokens on either side.
  assert _sums(sides)[:2] == (3, 12)


def test_inputs_and_targets_of_an_encoder_decoder_are_counted():
  rows = seq2seq.pad_pairs([[5, 6, 1]], [[7, 1]], 4, 4)
  assert _sums(rows)[:2] == (1, 5)


def test_a_likelihood_of_no_token_is_nan():
  rows = []
  writer = types.SimpleNamespace(write=rows.append)
  progress = types.SimpleNamespace(update=lambda *a: {})
  report = Report(progress, [writer], lambda step: 0.1, 0.5)
  none = {'tokens': 0, 'nll': 0.0, 'correct': 0}
  some = {'tokens': 4, 'nll': 6.0, 'correct': 1}
  for step, sums in enumerate((none, some), 1):
    aux = {'loss': 1.0, 'router_loss': 0.0, 'gradient_norm': 1.0, 'routing': {}}
    report.add(step, decoder_only.pad_samples([ONE], 5), aux | sums)
  report.tell()
  assert np.isnan([rows[0]['nll'], rows[0]['token_accuracy']]).all()
  assert (rows[1]['nll'], rows[1]['token_accuracy']) == (1.5, 0.25)
  # What takes rows takes these.
  assert 'train/nll' not in scalars(rows[0])
  json.dumps(_finite(rows[0]), allow_nan=False)
  seen = History([_finite(rows[0])])
  seen.write(rows[1])
  np.testing.assert_array_equal(seen.curve('nll')[1], [np.nan, 1.5])


def test_a_router_that_is_collapsed_three_logs_in_a_row_raises_an_alarm():
  lines = []
  progress = types.SimpleNamespace(say=lines.append)
  report = Report(progress, [], lambda step: 0.1, 0.9)
  for logs in ('q', 'q', '', 'q', 'q', 'q', 'q'):
    report._raise_alarms({f'{site}, layer 0': 'so' for site in logs})
    expected = [] if len(lines) == 0 else ['router alarm: q, layer 0: so']
    assert lines == expected
  # Not at the second log in a row, and once at the third.
  assert lines == ['router alarm: q, layer 0: so']


def test_the_evaluation_after_training_is_a_row_where_the_step_has_none():
  rows = []
  writer = types.SimpleNamespace(write=rows.append)
  progress = types.SimpleNamespace(say=lambda line: None)
  make = lambda last: Report(  # noqa: E731
    progress, [writer], lambda step: 0.1, 0.5, validated=last
  )
  after = {'step': 7, 'validation_loss': 1.5, 'means': {'B': 0.5}}
  assert make(None).concluded(7, after) and make(5).concluded(7, after)
  assert rows == [{'step': 7, 'validation_loss': 1.5}] * 2
  # A finished run that is started again, and one validated at its last step.
  assert not make(7).concluded(7, after)
  report = make(None)
  report.validated(7, {'validation_loss': 1.5})
  assert not report.concluded(7, after)
  assert not make(None).concluded(7, {'step': 7, 'means': {}})


ONE = decoder_only.Sample(np.array([7, 8, 1]), np.array([False, True, True]))
