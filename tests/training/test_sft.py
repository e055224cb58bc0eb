# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on conversations in the one loop, and the cards for it."""

import importlib.util
import json

import pytest

from moepeft import evaluate, registries, train
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.hf import model as hf
from moepeft.config import check as config_check
from moepeft.data.text import span_corruption
from moepeft.runs.metrics_log import read
from tests import ROOT

from .. import chat_cases
from .test_decoder_training import card as decoder_card


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A small decoder with its tokenizer beside it."""
  path = str(tmp_path_factory.mktemp('base') / 'hf')
  config = decoder_card()
  made = base_lib.load(config.model)
  model, _ = base_lib.module(made, config)
  params = base_lib.initialise(made, model, 0)['params']
  hf.save(path, made.config, params)
  chat_cases.tokenizer().save_pretrained(path)
  return path


@pytest.fixture
def rows(tmp_path):
  talks = [
    {'instruction': f'count to {n}', 'output': ' '.join(map(str, range(n)))}
    for n in range(2, 25)
  ]
  (tmp_path / 'rows.json').write_text(json.dumps(talks))
  return str(tmp_path / 'rows.json')


def card(base, rows, **changes):
  return decoder_card(
    **{
      'model.path': base,
      'model.family': '',
      'model.shape': {},
      'method': "molora(experts=2, rank=2, targets='*/q|*/wo')",
      'data.tokenizer': '',
      'data.source': 'chat',
      'data.path': rows,
      'data.packing': True,
      'data.validation_fraction': 0.2,
      'evaluation.every_steps': 2,
      'optimizer.learning_rate': 1e-2,
    }
    | changes
  )


def test_answers_are_learnt_and_judged_again_the_same(base, rows, tmp_path):
  workdir = str(tmp_path / 'w')
  train.train(card(base, rows), workdir)
  seen = read(f'{workdir}/metrics.jsonl')
  losses = [r['validation_loss'] for r in seen if 'validation_loss' in r]
  assert len(losses) == 2 and losses[1] < losses[0]
  # At least what begins a turn is not trained.
  shares = [r['targets_padding'] for r in seen if 'targets_padding' in r]
  assert shares and min(shares) > 0.3
  actual, measured = evaluate.evaluate(workdir)
  assert actual['validation_loss'] == pytest.approx(losses[1], rel=1e-5)
  assert measured == []


def load(name):
  spec = importlib.util.spec_from_file_location('card', ROOT / 'configs' / name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_a_cards_value_may_hold_commas_in_parentheses():
  text = 'model=m,method=molora(experts=2, router=topk(k=1)),data=d'
  c = load('sft.py').get_config(text)
  assert c.method == 'molora(experts=2, router=topk(k=1))'
  assert (c.model.path, c.data.path) == ('m', 'd')
  config_check.check(c, registries.BY_KEY)


def test_the_card_of_text_for_t5_fills_its_rows():
  c = load('pretrain_t5_tiny.py').get_config('text=a.txt')
  length = span_corruption.max_length(
    lambda x, y: x <= c.data.inputs_length, 0.15, 3.0
  )
  assert span_corruption.sizes(length, 0.15, 3.0) == (
    c.data.inputs_length,
    c.data.targets_length,
  )
  config_check.check(c, registries.BY_KEY)
  assert c.data.pretraining_objective == 'spans'
