# SPDX-License-Identifier: Apache-2.0
"""The sweeps of configs/ablate: their trials build, differ and keep budgets."""

import functools
import runpy

import pytest

from moepeft import registries
from moepeft.checkpoints.count_parameters import count
from moepeft.checkpoints.solve_method import with_explicit_method
from moepeft.config import check as config_check
from moepeft.sweeps import grid as grid_lib
from moepeft.sweeps.trials import make_trials
from tests import ROOT

FOLDER = ROOT / 'configs' / 'ablate'
NAMES = sorted(path.stem for path in FOLDER.glob('*.py'))
# One LoRA beside 2 to 30 experts: 2 e r + e = 90 times the widths of a layer.
GRANULARITY = (
  'lora(rank=45)',
  *(
    f'molora(experts={e}, rank={r})'
    for e, r in ((2, 22), (6, 7), (10, 4), (18, 2), (30, 1))
  ),
)


@functools.cache
def trials(name):
  path = str(FOLDER / f'{name}.py')
  grid = grid_lib.of_config(path)
  return make_trials(runpy.run_path(path)['get_config'](), grid)


def method_configs(name):
  """A config for each method, budget and scale of a sweep."""
  keys = 'method', 'budget', 'scale'
  return {
    tuple(trial.config[key] for key in keys): trial.config
    for trial in trials(name)
  }.values()


@pytest.mark.parametrize('name', NAMES)
def test_every_trial_of_a_sweep_has_a_config_that_is_accepted(name):
  assert len(trials(name)) > 4
  for config in method_configs(name):
    config_check.check(config, registries.BY_KEY)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_every_method_of_a_sweep_builds_within_its_budget(name):
  for config in method_configs(name):
    trained = count(with_explicit_method(config))['peft']
    assert trained > 0
    if config.budget:
      # The budget of configs/ablate is molora(experts=10, rank=4).
      assert trained == pytest.approx(457_280, rel=0.05), config.method


@pytest.mark.parametrize(
  'model, expected',
  [
    # Of widths d, nh and f, attention has q, k and v (d, nh) and o (nh, d), the
    # gated feed-forward wi_0 (d, f) and wo (f, d): where nh = d, 2 e r + e
    # times 4 d or d + f. Here d 128, nh 96: 10112 e r + 5280 e.
    (
      {},
      [10_112 * 45]
      + [
        10_112 * e * r + 5_280 * e
        for e, r in ((2, 22), (6, 7), (10, 4), (18, 2), (30, 1))
      ],
    ),
    pytest.param(
      {'path': '', 'family': 't5', 'size': 'xl'},
      [84_049_920] * 6,
      marks=pytest.mark.slow,
    ),
  ],
)
def test_granularity_compares_equal_budgets(model, expected):
  actual = []
  for method in GRANULARITY:
    config = trials('granularity')[0].config.copy_and_resolve_references()
    config.method = method
    config.model.update(model)
    actual.append(count(config)['peft'])
  assert actual == expected
  assert {c.method for c in method_configs('granularity')} == set(GRANULARITY)
  # Within 1 % of one another, routers included.
  assert max(actual) / min(actual) < 1.02
