# SPDX-License-Identifier: Apache-2.0
"""The rows that evaluation after training adds to the metrics."""

import types

import pytest

from moepeft.training.callbacks.evaluation import HeldOutEvaluation


def make_loop(tmp_path, evaluation, validated_step=None):
  """A loop at step 7 whose evaluator gives an evaluation; its logged rows."""
  rows = []
  return types.SimpleNamespace(
    step=7,
    first_step=7,
    signal=None,
    workdir=None,
    validation=None,
    before={},
    variables={},
    evaluator=lambda *arguments: evaluation,
    history=types.SimpleNamespace(last_step=lambda key: validated_step),
    run=types.SimpleNamespace(after_file=str(tmp_path / 'after.json')),
    log=rows.append,
  ), rows


@pytest.mark.parametrize('validated_step', [None, 5])
def test_a_step_without_a_validation_has_a_row_of_the_evaluation(
  tmp_path, validated_step
):
  evaluation = {'validation_loss': 1.5, 'means': {'B': 0.5}, 'rows': []}
  loop, rows = make_loop(tmp_path, evaluation, validated_step)
  callback = HeldOutEvaluation(0, before=False, after=True)
  callback.on_start(loop)
  callback.on_end(loop)
  assert rows == [{'validation_loss': 1.5}]
  assert loop.after == evaluation


@pytest.mark.parametrize(
  ('validated_step', 'evaluation'),
  [
    # A finished run that is started again.
    (7, {'validation_loss': 1.5, 'rows': []}),
    # No row is held out to validate on.
    (None, {'means': {}, 'rows': []}),
  ],
)
def test_a_second_row_or_an_empty_one_is_not_written(
  tmp_path, validated_step, evaluation
):
  loop, rows = make_loop(tmp_path, evaluation, validated_step)
  callback = HeldOutEvaluation(0, before=False, after=True)
  callback.on_start(loop)
  callback.on_end(loop)
  assert rows == []


def test_a_run_that_a_signal_ends_is_not_evaluated(tmp_path):
  loop, rows = make_loop(tmp_path, {'validation_loss': 1.5, 'rows': []})
  loop.signal = 15
  callback = HeldOutEvaluation(0, before=False, after=True)
  callback.on_start(loop)
  callback.on_end(loop)
  assert rows == [] and not (tmp_path / 'after.json').exists()
