# SPDX-License-Identifier: Apache-2.0
"""`import moepeft`: lazy names, and a model that is loaded, used and merged."""

import doctest
import importlib.util
import subprocess
import sys

import numpy as np
import pytest

import moepeft
from moepeft import config as config_lib
from moepeft import library
from moepeft.checkpoints import base as base_lib
from tests import ROOT
from tests.inference import banked

_PROMPT = 'item 45: a ship is a kind of'


@pytest.mark.parametrize('name', moepeft.__all__)
def test_exported_name_exists_and_is_no_submodules(name):
  assert getattr(moepeft, name).__doc__
  assert name in dir(moepeft)
  assert importlib.util.find_spec(f'moepeft.{name}') is None


def test_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match='no_such_name'):
    _ = moepeft.no_such_name


def test_import_is_lazy():
  code = (
    'import moepeft, sys; assert "jax" not in sys.modules; '
    'moepeft.ROUTERS; assert "moepeft.train" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_doctests(monkeypatch):
  monkeypatch.chdir(ROOT)
  result = doctest.testmod(library)
  assert result.attempted > 2 and result.failed == 0


@pytest.fixture(scope='module')
def model():
  return moepeft.load('package:t5_tiny')


def test_greedy_answer_has_the_greatest_log_probability_of_its_prompt(model):
  (answer,) = model.generate([_PROMPT], max_new_tokens=8)
  assert answer.finish_reason == 'stop' and not answer.experts
  greedy, other = model.log_probs([_PROMPT, _PROMPT], [answer.text, 'zzzz'])
  assert greedy.shape == (len(answer.token_ids),)
  assert greedy.sum() > other.sum()
  # Greedy: no token of the vocabulary, of 384 ids, is likelier than it.
  assert greedy.min() > -np.log(384)


def test_a_base_has_nothing_to_merge(model):
  with pytest.raises(ValueError, match='merge'):
    model.merge()


def test_a_base_takes_no_checkpoint():
  with pytest.raises(ValueError, match='is for runs'):
    moepeft.load('package:t5_tiny', checkpoint='best')


def test_evaluation_is_the_commands(model, tmp_path):
  rows = tmp_path / 'rows.jsonl'
  rows.write_text(
    '{"inputs": "item 45: a ship is a kind of", "choices": ["vehicle", "q"], '
    '"label": 0}\n'
  )
  summary = model.evaluate(str(rows))
  (row,) = summary['rows']
  assert (row['task'], row['examples'], row['chance']) == ('rows', 1, 0.5)
  scores = model.log_probs([_PROMPT, _PROMPT], ['vehicle', 'q'])
  assert row['accuracy'] == float(scores[0].sum() > scores[1].sum())


def test_a_merged_model_answers_as_its_adapter_did(model, tmp_path):
  base = base_lib.load(config_lib.default().model)
  method = "lora(rank=2, targets='*/q|*/wo')"
  path, *_ = banked.save(tmp_path / 'lora', base, method, noise=0.1)
  check_merged(moepeft.load('package:t5_tiny', path), model)


@pytest.mark.slow
def test_a_merged_run_answers_as_its_adapter_did(tmp_path):
  config = moepeft.load_config('configs/molora_t5.py')
  config.method = "lora(rank=2, targets='*/q|*/wo')"
  config.update(
    {
      'steps': 2,
      'batch_size': 4,
      'model': {'scan_unroll': 1},
      'evaluation': {'before': False, 'after': False},
      'log': {'plots': False, 'trackers': ''},
    }
  )
  # Large, so that the adapter changes the answers' probabilities.
  config.optimizer.learning_rate = 0.1
  model = moepeft.fit(config, str(tmp_path / 'run'))
  check_merged(model, moepeft.load(str(tmp_path / 'run'), checkpoint='base'))


def check_merged(model, base):
  merged = model.merge()
  assert (model.method.split('(')[0], merged.method) == ('lora', 'none')
  by_model, by_merged, by_base = (
    m.log_probs([_PROMPT], ['vehicle'])[0] for m in (model, merged, base)
  )
  # float32, products in another order.
  np.testing.assert_allclose(by_merged, by_model, rtol=1e-4, atol=1e-4)
  assert np.abs(by_base - by_model).max() > 0.1
