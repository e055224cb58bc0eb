# SPDX-License-Identifier: Apache-2.0
"""Keys of before are refused with the new name; runs of before still load."""

import json

import pytest

from moepeft.config import default, renamed
from moepeft.config.suggestions import keys
from moepeft.runs.run import Run

from .. import commands

KEYS = set(keys())


def test_every_new_name_is_a_key_and_no_old_one_is():
  assert set(renamed.RENAMED.values()) <= KEYS
  assert not KEYS & renamed.RENAMED.keys()
  assert len(set(renamed.RENAMED.values())) == len(renamed.RENAMED)


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('accumulate', 'gradient_accumulation_steps'),
    ('data.held_out', 'data.validation_fraction'),
  ],
)
def test_a_flag_of_before_is_refused_with_the_new_name(old, new):
  result = commands.run('moepeft.count', f'--config.{old}=1')
  assert result.returncode == 2
  assert result.stderr == (
    f'error: config.{old} is now config.{new}; write that\n'
  )


def test_a_config_file_of_before_is_refused_with_the_new_name(tmp_path):
  (tmp_path / 'mine.py').write_text(
    'from moepeft.config import default\n'
    'def get_config():\n'
    '  c = default()\n'
    '  c.optimizer.clip = 0.5\n'
    '  return c\n'
  )
  result = commands.run('moepeft.count', f'--config={tmp_path}/mine.py')
  assert result.returncode == 2
  assert result.stderr == (
    'error: config.optimizer.clip is now config.optimizer.max_grad_norm; write '
    'that\n'
  )


def test_a_run_of_before_loads_with_its_values(tmp_path):
  config = json.loads(default().to_json())
  config['accumulate'] = 4
  del config['gradient_accumulation_steps']
  config['data']['held_out'] = 0.25
  del config['data']['validation_fraction']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  run = Run(str(tmp_path))
  assert run.read_config()['data']['validation_fraction'] == 0.25
  loaded = run.load_config()
  assert loaded.gradient_accumulation_steps == 4
  assert loaded.data.validation_fraction == 0.25
  assert 'accumulate' not in loaded and 'held_out' not in loaded.data


@pytest.mark.parametrize(
  ('config', 'imports'),
  [
    ({'data': {'module': 'my.tasks'}}, 'my.tasks'),
    ({'imports': '', 'data': {'module': 'my.tasks'}}, 'my.tasks'),
    ({'imports': 'mine', 'data': {'module': 'my.tasks'}}, 'mine,my.tasks'),
    ({'imports': 'mine', 'data': {'module': ''}}, 'mine'),
  ],
)
def test_the_module_of_seqio_s_tasks_is_imported_with_the_others(
  config, imports
):
  assert renamed.translate_config(config) == {'imports': imports, 'data': {}}


def test_a_value_of_before_of_the_wrong_type_is_damage(tmp_path):
  (tmp_path / 'config.json').write_text('{"accumulate": "four"}')
  with pytest.raises(ValueError, match='config.json is damaged'):
    Run(str(tmp_path)).read_config()


def test_the_option_sites_of_before_is_refused_and_translated_where_stored():
  from moepeft.models.t5 import model as t5
  from moepeft.peft import build

  new = "lora(rank=2, targets='*/q') + ia3(targets='*/k')"
  old = new.replace('targets', 'sites')
  with pytest.raises(ValueError, match='lora: the option sites is now targets'):
    build(old, t5.sites(t5.config('small')))
  assert renamed.translate_config({'method': old})['method'] == new
