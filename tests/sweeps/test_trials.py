# SPDX-License-Identifier: Apache-2.0
"""The trials of a grid: their settings, names, flags and refusals."""

import re

import pytest

from moepeft import config as config_lib
from moepeft.sweeps import grid
from moepeft.sweeps.trials import make_trials


def trials(text, **changes):
  config = config_lib.default()
  config.update_from_flattened_dict(changes)
  return make_trials(config, grid.parse(text))


def test_trials_are_all_combinations_and_the_last_key_is_the_fastest():
  all_trials = trials('optimizer.learning_rate=1e-3,3e-3; seed=0..2')
  assert [dict(trial.settings) for trial in all_trials] == [
    {'optimizer.learning_rate': rate, 'seed': seed}
    for rate in (0.001, 0.003)
    for seed in (0, 1, 2)
  ]
  assert [trial.index for trial in all_trials] == list(range(6))
  assert all_trials[4].name == 'learning_rate-0.003_seed-1'
  assert all_trials[4].flags == (
    '--config.optimizer.learning_rate=0.003',
    '--config.seed=1',
  )
  assert all_trials[4].config.optimizer.learning_rate == 0.003
  assert all_trials[4].config.seed == 1


def test_values_have_the_type_of_their_key():
  (trial,) = trials(
    "data.packing=true; steps=7; data.temperature=inf; data.tasks='A,counting'"
  )
  assert trial.config.data.packing is True
  assert trial.config.steps == 7
  assert trial.config.data.temperature == float('inf')
  assert trial.config.data.tasks == 'A,counting'


def test_options_are_set_in_the_method():
  all_trials = trials('method=molora(experts=2)|mov; experts=2,5; seed=0')
  assert [trial.method for trial in all_trials] == [
    'molora(experts=2)',
    'molora(experts=5)',
    'mov(experts=2)',
    'mov(experts=5)',
  ]
  assert all_trials[1].config.method == 'molora(experts=5)'
  assert all_trials[1].flags[0] == '--config.method=molora(experts=5)'
  assert all_trials[1].name == 'molora-experts-5_seed-0'
  assert all_trials[1].settings == {
    'method': 'molora(experts=2)',
    'experts': 5,
    'seed': 0,
  }


def test_options_reach_the_config_s_method_an_expert_and_a_sum():
  method = 'mixture(expert=lora(rank=4), experts=2) + ia3'
  all_trials = trials(
    "rank=2,8; router=softmax|topk(k=2); targets='*/self/q|*/wo'",
    method=method,
  )
  assert [trial.method for trial in all_trials][1] == (
    'mixture(expert=lora(rank=2), experts=2, router=topk(k=2), '
    "targets='*/self/q|*/wo') + ia3(targets='*/self/q|*/wo')"
  )
  assert len({trial.name for trial in all_trials}) == 4


def test_an_option_of_a_name_leaves_methods_without_it_as_they_are():
  all_trials = trials(
    'method=lora(rank=4)|molora; molora.experts=2,5; seed=0,1'
  )
  assert [trial.name for trial in all_trials] == [
    'lora-rank-4_seed-0',
    'lora-rank-4_seed-1',
    'molora-experts-2_seed-0',
    'molora-experts-2_seed-1',
    'molora-experts-5_seed-0',
    'molora-experts-5_seed-1',
  ]
  assert [trial.index for trial in all_trials] == list(range(6))
  assert 'molora.experts' not in all_trials[0].settings


def test_a_budget_is_a_key_of_the_config_or_stands_in_a_method():
  text = "method=lora|molora(budget='params:5000'); scale=matched"
  assert [trial.method for trial in trials(text)] == [
    'lora',
    "molora(budget='params:5000')",
  ]
  (trial,) = trials("budget='params:0.5%'; experts=4")
  assert trial.config.budget == 'params:0.5%'


def test_seed_is_the_run_s_and_vera_s_by_its_name():
  (trial,) = trials('method=vera; vera.seed=3; seed=5')
  assert trial.config.seed == 5
  assert trial.method == 'vera(seed=3)'


def test_a_name_does_not_depend_on_the_other_trials():
  name = trials('method=lora; seed=0')[0].name
  assert name == 'lora_seed-0'
  assert trials('method=molora|lora; seed=9,0')[3].name == name


def test_long_names_and_names_of_other_characters_end_in_a_hash():
  first, second = (
    trials(f"model.path='runs/{name}'")[0].name for name in ('a/b', 'a-b')
  )
  assert re.fullmatch(r'path-runs-a-b_[0-9a-f]{8}', first)
  assert first != second
  method = (
    'mixture(expert=lora(rank=4, alpha=16.0), experts=10, router=topk(k={}))'
  )
  long_names = [
    trial.name
    for trial in trials(
      f'method={method.format(1)}|{method.format(2)}; semantics=paper'
    )
  ]
  assert len(set(long_names)) == 2
  assert all(len(name) <= 80 for name in long_names)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('optimizer.learning_rat=1', 'did you mean config.optimizer.learning_rate'),
    ('learning_rate=1', 'did you mean config.optimizer.learning_rate'),
    ('optimizer=adamw', 'config.optimizer is a section'),
    ('expert_count=1', 'there is no config.expert_count'),
    ('expertz=2', "did you mean 'experts'?"),
    ('patience=2', 'is now config.early_stopping_patience'),
    ('steps=1.5', "config.steps is a whole number; got '1.5'"),
    ('data.packing=perhaps', 'config.data.packing is true or false'),
    ('seed=1,01', 'seed has the value 01 twice'),
    ('optimizer.learning_rate=1e-3,0.001', 'has the value 0.001 twice'),
    (
      'method=lora(rank=4)|molora; experts=2',
      "the method 'lora(rank=4)' has no option experts; write NAME.experts",
    ),
    ('method=lora|molora; lora.experts=2', 'has no option experts'),
    ('method=lora|full; rank=2', "the method 'full' has no option rank"),
    ('method=lorra', "did you mean 'lora'?"),
    ('experts=many', "option experts is of type int; got 'many'"),
    ('experts=0', "molora's option experts is at least 1"),
    (
      'method=molora(experts=2)|molora(experts=5); experts=2,5',
      'has the run molora-experts-2 twice',
    ),
    ('seed=0..9999; steps=1,2', '--grid has 20,000 trials'),
  ],
)
def test_a_wrong_grid_is_one_sentence(text, message):
  with pytest.raises(ValueError) as error:
    trials(text)
  assert message in str(error.value)
  assert '\n' not in str(error.value)
