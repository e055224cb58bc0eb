# SPDX-License-Identifier: Apache-2.0
"""The callbacks that a config turns on, and their order."""

import pytest
from ml_collections.config_flags import config_path

from moepeft import config as config_lib
from moepeft.training import callbacks
from moepeft.training.callbacks import CALLBACKS, Callback, CallbackEntry


def enabled(**changes):
  """Class names of the callbacks of a config."""
  config = config_lib.default()
  config.update_from_flattened_dict(changes)
  return [type(each).__name__ for each in callbacks.build_callbacks(config)]


def test_the_default_run_logs_evaluates_answers_signals_saves_and_draws():
  assert enabled() == [
    'MetricsLogging',
    'HeldOutEvaluation',
    'SignalHandling',
    'Checkpointing',
    'Plotting',
  ]


def test_keys_of_the_config_turn_callbacks_on_and_off():
  off = {'evaluation.before': False, 'evaluation.after': False}
  assert enabled(**off, **{'log.plots': False}) == [
    'MetricsLogging',
    'SignalHandling',
    'Checkpointing',
  ]
  on = {'evaluation.every_steps': 5, 'profile.steps': '1:2'}
  assert enabled(**off, **on) == [
    'MetricsLogging',
    'HeldOutEvaluation',
    'ValidationLossTracking',
    'SignalHandling',
    'Checkpointing',
    'Plotting',
    'Profiling',
  ]


def test_a_registered_callback_runs_where_it_is_named(monkeypatch):
  class Logger(Callback):
    pass

  monkeypatch.setattr(CALLBACKS, '_entries', dict(CALLBACKS._entries))
  CALLBACKS.register('mine_registered', CallbackEntry(lambda config: Logger()))
  assert 'Logger' not in enabled()
  # Before the step is saved, so that it may ask for that.
  names = enabled(callbacks='mine_registered')
  assert names.index('Logger') + 1 == names.index('SignalHandling')


def test_an_unknown_callback_is_refused():
  with pytest.raises(ValueError, match="no callback 'plottin'.*'plotting'"):
    enabled(callbacks='plottin')


@pytest.mark.parametrize('name', CALLBACKS)
def test_an_entry_is_enabled_by_keys_that_there_are(name):
  entry, config = CALLBACKS[name], config_lib.default()
  assert entry.enabled_by
  for key in entry.enabled_by:
    # An unknown key is an error here.
    assert config_path.get_value(key, config) is not None
