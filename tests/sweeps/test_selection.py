# SPDX-License-Identifier: Apache-2.0
"""The validation loss of the first seed chooses values, group by group."""

import pytest

from moepeft.sweeps import selection
from moepeft.sweeps.runner import Sweep

from .planted import finish, planted

GRID = 'method=lora|ia3; optimizer.learning_rate=1e-3,3e-3; seed=4,0,1'
KEYS = ('optimizer.learning_rate',)


def by_name(trials):
  return {trial.name: trial for trial in trials}


def test_the_first_seed_is_run_with_all_values_before_any_other(tmp_path):
  directory, trials = planted(tmp_path, GRID)
  sweep = Sweep(directory, trials, KEYS)
  assert [trial.name for trial in sweep.to_run()] == [
    'lora_learning_rate-0.001_seed-4',
    'lora_learning_rate-0.003_seed-4',
    'ia3_learning_rate-0.001_seed-4',
    'ia3_learning_rate-0.003_seed-4',
  ]
  # Two rates with one seed, one with two more, for each method.
  assert sweep.remaining() == 8


def test_the_lowest_validation_loss_is_chosen_whatever_the_test_says(tmp_path):
  directory, trials = planted(tmp_path, GRID)
  named = by_name(trials)
  low, high = (named[f'lora_learning_rate-0.00{i}_seed-4'] for i in (1, 3))
  finish(directory, low, 1.25, means={'A held_out': 0.1})
  finish(directory, high, 1.5, means={'A held_out': 0.9})
  sweep = Sweep(directory, trials, KEYS)
  # ia3 is not decided; lora's seeds need not wait for it.
  assert [trial.name for trial in sweep.to_run()] == [
    'lora_learning_rate-0.001_seed-0',
    'lora_learning_rate-0.001_seed-1',
    'ia3_learning_rate-0.001_seed-4',
    'ia3_learning_rate-0.003_seed-4',
  ]
  assert sweep.remaining() == 6
  rows = {row['name']: row for row in sweep.final_rows()}
  assert rows[low.name]['chosen'] is True
  assert rows[high.name]['chosen'] is False
  assert rows[high.name]['why'] == (
    'method=lora: 0.001 has the lowest validation loss of '
    'optimizer.learning_rate with seed 4 (0.001: 1.25, 0.003: 1.5)'
  )
  assert rows['lora_learning_rate-0.003_seed-0']['status'] == 'left out'
  assert rows['ia3_learning_rate-0.003_seed-0']['status'] == 'unfinished'
  assert rows['ia3_learning_rate-0.003_seed-0']['chosen'] is None


def test_a_value_that_fails_or_diverges_is_not_chosen(tmp_path):
  directory, trials = planted(
    tmp_path, 'optimizer.learning_rate=1e-3,3e-3,1e-2; seed=0,1'
  )
  named = by_name(trials)
  directory.write_failure(named['learning_rate-0.001_seed-0'], 'no memory')
  finish(directory, named['learning_rate-0.003_seed-0'], 2.0)
  finish(directory, named['learning_rate-0.01_seed-0'], None)
  sweep = Sweep(directory, trials, KEYS)
  assert [t.name for t in sweep.to_run()] == ['learning_rate-0.003_seed-1']


def test_no_other_seed_is_run_where_all_values_fail(tmp_path):
  directory, trials = planted(
    tmp_path, 'optimizer.learning_rate=1e-3,3e-3; seed=0,1'
  )
  for trial in trials:
    if trial.settings['seed'] == 0:
      directory.write_failure(trial, 'no memory')
  sweep = Sweep(directory, trials, KEYS)
  assert sweep.to_run() == [] and sweep.remaining() == 0
  rows = sweep.final_rows()
  assert [row['status'] for row in rows] == [
    *('failed', 'left out', 'failed', 'left out')
  ]
  assert (
    'has a validation loss (0.001: failed, 0.003: failed)' in (rows[0]['why'])
  )


def test_several_keys_are_chosen_together(tmp_path):
  directory, trials = planted(
    tmp_path, 'rank=2,4; optimizer.learning_rate=1e-3,3e-3; seed=0,1'
  )
  for trial in trials:
    if trial.settings['seed'] == 0:
      finish(directory, trial, 1.0 + trial.index)
  sweep = Sweep(directory, trials, ('rank', 'optimizer.learning_rate'))
  assert [t.settings for t in sweep.to_run()] == [
    {'rank': 2, 'optimizer.learning_rate': 0.001, 'seed': 1}
  ]


def test_keys_of_select_are_keys_of_the_grid(tmp_path):
  _, trials = planted(tmp_path, GRID)
  assert selection.parse_keys('', trials) == ()
  assert selection.parse_keys('config.optimizer.learning_rate', trials) == KEYS
  with pytest.raises(
    ValueError, match="did you mean 'optimizer.learning_rate'"
  ):
    selection.parse_keys('optimizer.learning_rat', trials)
  with pytest.raises(ValueError, match='seed is none of them'):
    selection.parse_keys('seed', trials)
