# SPDX-License-Identifier: Apache-2.0
"""A run starts from the adapter of another run: SFT, then DPO."""

import importlib.util
import json
import math

import jax
import numpy as np
import pytest

from moepeft import train
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.restore import restore_trained
from tests import ROOT

from ..preferences import card, written

_CONFIGS = ROOT / 'configs'


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  return written(tmp_path_factory.mktemp('start'))


def supervised(places, folder, **changes):
  """A config of plain text, as before preference tuning."""
  file = folder / 'text.txt'
  rows = [f'the sun is {i} and the moon is {i + 1}' for i in range(60)]
  file.write_text('\n\n'.join(rows))
  text = {
    'objective': 'causal',
    'data.source': 'text',
    'data.path': str(file),
    'steps': 2,
  }
  return card(places, **text | changes)


@pytest.fixture(scope='module')
def run(places, tmp_path_factory):
  folder = tmp_path_factory.mktemp('sft')
  train.train(supervised(places, folder), str(folder / 'run'))
  return str(folder / 'run')


@pytest.mark.slow
def test_preference_tuning_starts_from_a_run(places, run, tmp_path):
  changes = {
    'model.adapter': run,
    'preference.reference': run,
    'evaluation.before': True,
    'evaluation.every_steps': 2,
    'steps': 2,
  }
  train.train(card(places, **changes), str(tmp_path / 'dpo'))
  before = json.loads((tmp_path / 'dpo' / 'before.json').read_text())
  # Policy and reference are the run's adapter: every margin is 0, and the
  # loss is -log sigmoid(0) = ln 2.
  assert before['validation_loss'] == pytest.approx(math.log(2), abs=1e-6)


def test_a_run_gives_the_adapter_of_its_latest_checkpoint(places, run):
  config = card(places)
  base = base_lib.load(config.model)
  start = base_lib.load_adapter(run, base.config)
  expected, actual = restore_trained(run)
  assert actual['step'] == 2
  jax.tree.map(np.testing.assert_array_equal, start.tree, expected)
  assert start.sha256 == base.sha256


def test_a_run_that_trained_the_base_has_no_adapter(places, tmp_path):
  whole = supervised(places, tmp_path, method='full')
  train.train(whole, str(tmp_path / 'full'))
  changes = {'model.adapter': str(tmp_path / 'full')}
  with pytest.raises(ValueError, match='has no adapter'):
    train.train(card(places, **changes), str(tmp_path / 'dpo'))


def test_a_directory_without_an_adapter_names_what_is_read(places, tmp_path):
  config = card(places)
  with pytest.raises(ValueError, match='the work directory of a run'):
    base_lib.load_adapter(config.model.path, None)


def method_of(name):
  spec = importlib.util.spec_from_file_location(name, _CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config().method


@pytest.mark.parametrize(
  'names',
  [
    ('sft_smollm2', 'dpo_smollm2', 'kto_smollm2'),
    ('sft_llama3', 'dpo_llama3'),
  ],
)
def test_configs_of_one_model_have_one_method(names):
  assert len({method_of(name) for name in names}) == 1
