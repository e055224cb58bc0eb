# SPDX-License-Identifier: Apache-2.0
"""Settings of a form become a config, and a config file that gives it again."""

import json
import runpy

import pytest

from moepeft import config as config_lib
from moepeft.board import settings
from moepeft.board.folders import Folders


def written(tmp_path, config):
  """The config that a rendered file returns."""
  (tmp_path / 'card.py').write_text(settings.render(config))
  return runpy.run_path(str(tmp_path / 'card.py'))['get_config']()


def test_texts_get_the_type_of_their_key():
  config = settings.make_config(
    {
      'steps': ' 7 ',
      'optimizer.learning_rate': '2e-3',
      'data.packing': 'True',
      'evaluation.before': 'false',
      'method': 'lora(rank=2)',
      'data.temperature': 'inf',
      'sharding.rules': "(('mlp', 'model'),)",
      'model.shape.layers': '3',
      'model.shape.rope.kind': 'yarn',
      'router_losses.load_balance': '0.5',
    }
  )
  assert (config.steps, config.optimizer.learning_rate) == (7, 2e-3)
  assert (config.data.packing, config.evaluation.before) == (True, False)
  assert config.method == 'lora(rank=2)'
  assert config.data.temperature == float('inf')
  assert config.sharding.rules == (('mlp', 'model'),)
  assert config.model.shape.to_dict() == {
    'layers': 3,
    'rope': {'kind': 'yarn'},
  }
  assert config.router_losses.load_balance == 0.5


@pytest.mark.parametrize(
  ('key', 'text', 'sentence'),
  [
    ('stepz', '3', 'did you mean config.steps?'),
    ('steps', '3.5', 'config.steps is a whole number'),
    ('steps', '', 'config.steps is a whole number'),
    ('optimizer.learning_rate', 'fast', 'is a number'),
    ('data.packing', 'perhaps', 'true or false'),
    ('data', 'x', 'no config.data'),
    ('imports', 'os', 'cannot be set on the board'),
    ('callbacks', 'x', 'cannot be set on the board'),
    ('__class__', 'x', 'no config.__class__'),
  ],
)
def test_a_wrong_setting_is_one_sentence(key, text, sentence):
  with pytest.raises(ValueError, match=sentence) as error:
    settings.make_config({key: text})
  assert len(str(error.value).splitlines()) == 1


def test_a_config_file_returns_the_config_it_was_written_from(tmp_path):
  config = settings.make_config(
    {
      'method': 'molora(experts=3, rank=2)',
      'data.path': 'it\'s "quoted"\\\n# no comment',
      'data.temperature': 'inf',
      'data.system_prompt': "'''\nimport os",
      'model.shape.layers': '3',
      'router_losses.z': '0.25',
    }
  )
  assert written(tmp_path, config).to_json() == config.to_json()


def test_the_file_of_the_default_config_changes_no_key():
  assert settings.render(config_lib.default()).splitlines()[-2:] == [
    '  c = config_lib.default()',
    '  return c',
  ]


def test_a_key_of_a_run_cannot_be_code():
  config = config_lib.default()
  config['x; import os #'] = 1
  with pytest.raises(ValueError, match='there is no config'):
    settings.render(config)


@pytest.mark.parametrize('name', sorted(settings.preset_files()))
def test_a_config_that_ships_is_the_same_through_the_form(name, tmp_path):
  path = settings.preset_files()[name]
  config = runpy.run_path(path)['get_config']()
  texts = settings.texts(settings.preset(name))
  assert settings.make_config(texts).to_dict() == config.to_dict()
  assert json.loads(json.dumps(texts)) == texts


def test_configs_that_ship_stay_in_the_folders(tmp_path):
  folders = Folders(str(tmp_path))
  for name in settings.preset_files():
    folders.check_paths(
      settings.make_config(settings.texts(settings.preset(name)))
    )


def test_an_unknown_preset_is_refused_with_the_names():
  with pytest.raises(ValueError, match='molora_t5'):
    settings.preset('../x')
