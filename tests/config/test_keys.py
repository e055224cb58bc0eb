# SPDX-License-Identifier: Apache-2.0
"""A config file that sets a key which no code reads is refused."""

import importlib.util

import pytest
from ml_collections import ConfigDict

from moepeft import config as config_lib
from moepeft import registries
from moepeft.config import check as config_check
from moepeft.data.readers.reader import DataReader
from tests import ROOT

from .. import commands

CONFIG_FILES = sorted(
  path.relative_to(ROOT).as_posix() for path in ROOT.glob('configs/**/*.py')
)


def check_keys(config):
  config_check.check_keys(config, registries.BY_KEY)


@pytest.mark.parametrize(
  ('key', 'message'),
  [
    ('optimzer', 'config.optimzer; did you mean config.optimizer.'),
    ('stepz', 'config.stepz; did you mean config.steps?'),
    ('data.lenght', 'config.data.lenght; did you mean config.data.length?'),
    ('log.tensorboard', 'config.log.tensorboard; moepeft/config/defaults.py'),
    ('profile.every_steps', 'config.profile.every_steps; did you mean '),
  ],
)
def test_a_mistyped_key_is_refused_with_the_nearest(key, message):
  config = config_lib.default()
  section, _, name = key.rpartition('.')
  setattr(config[section] if section else config, name, 3)
  with pytest.raises(ValueError, match='^there is no ') as refusal:
    check_keys(config)
  assert message in str(refusal.value)


def test_a_mistyped_section_is_refused_with_the_nearest():
  config = config_lib.default()
  config.evalution = ConfigDict(dict(path='rows'))
  with pytest.raises(ValueError, match=r'mean config\.evaluation\?$'):
    check_keys(config)


def test_open_keys_are_allowed():
  config = config_lib.default()
  config.router_losses.my_loss = 0.1
  config.model.shape.layers = 3
  config.model.shape.rope = ConfigDict(dict(kind='yarn'))
  # A section that a user's objective or callback reads.
  config.digits = ConfigDict(dict(weight=4.0))
  check_keys(config)


def test_a_key_that_an_entry_reads_is_allowed():
  config = config_lib.default()
  config.data.delimiter = ';'
  with pytest.raises(ValueError, match=r'no config\.data\.delimiter'):
    check_keys(config)
  reader = DataReader(open=None, config_keys=('data.delimiter',))
  config_check.check_keys(config, {'data.source': {'csv': reader}})


@pytest.mark.parametrize('file', CONFIG_FILES)
def test_every_config_file_sets_known_keys(file):
  spec = importlib.util.spec_from_file_location('config_file', ROOT / file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  check_keys(module.get_config())


@pytest.mark.parametrize(
  'command',
  [
    ('moepeft.train', '--dry_run'),
    ('moepeft.count',),
    ('moepeft.ngrams',),
    ('moepeft.data',),
  ],
)
def test_commands_refuse_a_mistyped_key_of_a_config_file(tmp_path, command):
  (tmp_path / 'mine.py').write_text(
    'from moepeft.config import default\n'
    'def get_config():\n'
    '  c = default()\n'
    '  c.data.lenght = 3\n'
    '  return c\n'
  )
  result = commands.run(*command, f'--config={tmp_path}/mine.py')
  assert result.returncode == 2
  assert result.stderr == (
    'error: there is no config.data.lenght; did you mean config.data.length?\n'
  )
