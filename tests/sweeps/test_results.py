# SPDX-License-Identifier: Apache-2.0
"""Rows of results, from run directories; the directory of a sweep."""

import json

import pytest

from moepeft import config as config_lib
from moepeft.runs.router_diagnosis import dead_experts
from moepeft.sweeps import display, results
from moepeft.sweeps.directory import SweepDirectory
from moepeft.sweeps.runner import Sweep

from .planted import finish, planted

# Of four experts those below 1 / 400 are dead; of three of which each token has
# two, those below 2 / 300.
ROUTING = {
  'q': {'weight': [[0.5, 0.4976, 0.0024, 0.0], [0.25] * 4], 'entropy': [1, 1]},
  'k': {'tokens': [0.9934, 1.0, 0.0066], 'entropy': 0.1},
}


def test_a_row_has_the_figures_of_its_run(tmp_path):
  directory, (trial,) = planted(tmp_path, 'experts=4; seed=3')
  rows = [
    {'step': 10, 'loss': 2.0, 'routing': {'q': {'tokens': [1, 0]}}},
    {'step': 20, 'loss': 1.0, 'routing': ROUTING},
    {'step': 300, 'validation_loss': 1.75},
  ]
  for row in rows:
    for site in row.get('routing', {}).values():
      site.setdefault('entropy', 0.0)
  means = {'A held_out': 0.5, 'validation': 0.25}
  finish(directory, trial, 1.5, rows, means, parameters=4_000)
  assert results.read_row(directory, trial) == {
    'index': 0,
    'name': 'molora-experts-4-rank-4_seed-3',
    'settings': {'experts': 4, 'seed': 3},
    'method': 'molora(experts=4, rank=4)',
    'run': str(tmp_path / 'runs' / trial.name),
    'status': 'finished',
    'validation': {'loss': 1.5, 'accuracy': 0.25},
    'test': {'A held_out': 0.5},
    'steps': 300,
    'experts': 11,
    'dead_experts': 3,
    'parameters': 4_000,
    'seconds': 9.5,
  }


def test_without_a_last_evaluation_the_log_has_the_validation_loss(tmp_path):
  directory, (trial,) = planted(tmp_path, 'method=lora')
  rows = [
    {'step': 1, 'validation_loss': 2.5},
    {'step': 2, 'validation_loss': 2.25},
    {'step': 2, 'loss': 1.0},
  ]
  finish(directory, trial, None, rows)
  row = results.read_row(directory, trial)
  assert row['validation'] == {'loss': 2.25}
  # No router, no experts.
  assert 'experts' not in row


def test_dead_experts_have_at_most_a_percent_of_an_even_share():
  assert dead_experts(ROUTING) == (3, 11)
  assert dead_experts({}) == (0, 0)


def test_results_are_a_line_for_each_trial_in_the_order_of_the_grid(tmp_path):
  directory, trials = planted(tmp_path, 'seed=0..2')
  finish(directory, trials[2], 1.5)
  directory.write_failure(trials[0], 'the disk is full')
  Sweep(directory, trials).write()
  rows = [
    json.loads(line)
    for line in (tmp_path / 'results.jsonl').read_text().splitlines()
  ]
  assert [row['status'] for row in rows] == ['failed', 'unfinished', 'finished']
  assert rows[0]['error'] == 'the disk is full'
  assert 'why' not in rows[0]


def test_tables_compare_the_chosen_runs_of_a_sweep(tmp_path):
  grid = 'optimizer.learning_rate=1e-3,3e-3; seed=0..1'
  directory, trials = planted(tmp_path, grid)
  for trial, loss in zip(trials, (1.5, 1.75, 1.25, 1.0), strict=True):
    finish(directory, trial, loss)
  sweep = Sweep(directory, trials, ('optimizer.learning_rate',))
  sweep.write()
  # 3e-3 has the lower loss with the first seed.
  assert results.runs_to_compare(str(tmp_path)) == [
    directory.run(trial).path for trial in trials[2:]
  ]
  run = directory.run(trials[0]).path
  assert results.runs_to_compare(run) == [run]


def test_a_sweep_without_results_is_nothing_to_compare(tmp_path):
  directory, trials = planted(tmp_path, 'seed=0..1')
  Sweep(directory, trials).write()
  with pytest.raises(ValueError, match='no finished trial'):
    results.runs_to_compare(str(tmp_path))
  (tmp_path / 'results.jsonl').write_text('{')
  with pytest.raises(ValueError, match='is damaged'):
    results.runs_to_compare(str(tmp_path))


def test_a_failed_trial_is_run_again_by_the_next_sweep(tmp_path):
  directory, trials = planted(tmp_path, 'seed=0..2')
  finish(directory, trials[2], 1.5)
  directory.write_failure(trials[0], 'the disk is full')
  sweep = Sweep(directory, trials)
  assert sweep.to_run() == [trials[1]]
  assert sweep.remaining() == 1
  sweep.forget_failures()
  assert sweep.to_run() == trials[:2]
  assert sweep.remaining() == 2


def test_a_sweep_of_another_config_needs_another_directory(tmp_path):
  directory, _ = planted(tmp_path, 'seed=0..2')
  config = config_lib.default()
  # The grid may grow; it is no part of the config.
  directory.prepare(config)
  config.optimizer.learning_rate = 0.5
  with pytest.raises(ValueError, match='config.optimizer.learning_rate=0.001'):
    directory.prepare(config)


def test_the_directory_of_a_run_is_refused(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ValueError, match='is the work directory of a run'):
    SweepDirectory(str(tmp_path)).prepare(config_lib.default())


def test_the_table_has_the_columns_that_any_row_has(tmp_path):
  directory, trials = planted(tmp_path, 'seed=0..1')
  finish(directory, trials[1], 1.5, parameters=4_000)
  rows = Sweep(directory, trials).final_rows()
  assert display.table(rows) == [
    ['trial', 'status', 'validation loss', 'parameters', 'time'],
    ['seed-0', 'unfinished', '-', '-', '-'],
    ['seed-1', 'finished', '1.5000', '4,000', '0:10'],
  ]


def test_the_time_left_is_that_of_the_trials_over_the_jobs():
  assert display.time_left([], [], 4, 2) is None
  # Half of a trial in 5 s: 5 s more, and 10 s for each of three, by two.
  assert display.time_left([], [(5.0, 0.5)], 4, 2) == (5 + 30) / 2
  # Trials that ended count alone; one that runs for longer ends any moment.
  assert display.time_left([4.0, 8.0], [(9.0, 0.1)], 3, 1) == 12.0
