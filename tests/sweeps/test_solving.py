# SPDX-License-Identifier: Apache-2.0
"""Budgets and scales of a sweep are solved before the first trial is run."""

import pytest

from moepeft import config as config_lib
from moepeft.sweeps import grid, solving
from moepeft.sweeps.trials import make_trials

from .. import commands

SCALES = "method=lora(rank=2)|mov; scale=''|matched; seed=0,1"


def trials_of(text):
  return make_trials(config_lib.default(), grid.parse(text))


def test_trials_have_their_explicit_method_or_why_there_is_none():
  methods, errors = solving.solve(trials_of(SCALES))
  assert methods == {
    'lora-rank-2_scale-matched_seed-0': 'lora(rank=2, alpha=8.0)',
    'lora-rank-2_scale-matched_seed-1': 'lora(rank=2, alpha=8.0)',
  }
  assert list(errors) == [
    'mov_scale-matched_seed-0',
    'mov_scale-matched_seed-1',
  ]
  with pytest.raises(ValueError) as error:
    solving.check(errors)
  assert str(error.value) == (
    '--grid: nothing is run, as mov_scale-matched_seed-0 cannot be solved: mov '
    'has no alpha and rank, so that its scale cannot be matched; leave `scale` '
    'out (nor can mov_scale-matched_seed-1)'
  )
  solving.check({})


def test_trials_that_differ_in_seed_and_rate_are_solved_once(monkeypatch):
  solved = []

  def with_explicit_method(config):
    solved.append(config.method)
    return config

  monkeypatch.setattr(solving, 'with_explicit_method', with_explicit_method)
  text = 'method=lora|mov; seed=0..4; optimizer.learning_rate=1e-3,3e-3'
  assert solving.solve(trials_of(text)) == ({}, {})
  assert solved == ['lora', 'mov']


@pytest.mark.parametrize('mode', ['--dry_run', '--slurm'])
def test_a_trial_that_cannot_be_solved_is_refused_before_any_is_run(
  mode, tmp_path
):
  done = commands.run(
    'moepeft.sweep', mode, f'--grid={SCALES}', f'--workdir={tmp_path / "s"}'
  )
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert 'nothing is run, as mov_scale-matched_seed-0' in done.stderr
  assert not (tmp_path / 's').exists()
  is_listed = (
    '      solved: lora(rank=2, alpha=8.0)' in done.stdout.splitlines()
  )
  assert is_listed == (mode == '--dry_run')
