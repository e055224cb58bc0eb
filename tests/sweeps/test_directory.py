# SPDX-License-Identifier: Apache-2.0
"""A sweep's directory goes on with one config."""

import json

import pytest

from moepeft.config import defaults
from moepeft.sweeps.directory import SweepDirectory


@pytest.fixture
def directory(tmp_path):
  directory = SweepDirectory(str(tmp_path / 'sweep'))
  directory.prepare(defaults.default())
  return directory


def test_another_config_is_refused_and_names_its_key(directory):
  config = defaults.default()
  config.loss.z_loss = 0.5
  with pytest.raises(ValueError, match=r'config\.loss\.z_loss=0\.0, now it is'):
    directory.prepare(config)


def test_a_sweep_of_an_older_version_had_the_defaults_of_newer_keys(directory):
  with open(directory.config_file) as f:
    stored = json.load(f)
  del stored['config']['loss']['z_loss']
  with open(directory.config_file, 'w') as f:
    json.dump(stored, f)
  config = defaults.default()
  config.loss.z_loss = 0.5
  with pytest.raises(ValueError, match=r'config\.loss\.z_loss=0\.0, now it is'):
    directory.prepare(config)
  directory.prepare(defaults.default())
