# SPDX-License-Identifier: Apache-2.0
"""config.model.shape: what it changes, and what it cannot be."""

import json

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft import train
from moepeft.checkpoints import base
from moepeft.nn.rope import Rope
from moepeft.runs.metrics_log import read

from .. import commands

SMALL = dict(
  vocab=263, d_model=16, heads=2, kv_heads=1, head_dim=6, ffn=22, layers=2
)


def card(shape, family='llama', **model):
  c = config_lib.default()
  c.model.path, c.model.family, c.model.size = '', family, 'tiny'
  c.model.shape.update(shape)
  c.model.update(model)
  return c


def shape(changes, family='llama', **model):
  return base.shape(card(changes, family, **model).model)[1]


def test_what_is_not_said_stays_the_sizes_own():
  actual = shape({'rope': {'kind': 'linear', 'factor': 4.0}, 'window': 7})
  # Llama's tiny: theta 10,000.
  assert actual.rope == Rope(10000.0, 'linear', 4.0)
  assert (actual.window, actual.d_model, actual.heads) == (7, 128, 4)


def test_a_shape_is_the_same_after_json():
  changes = {'windowed': (True, False, True, False), 'rope': {'kind': 'yarn'}}
  first = card(changes)
  second = config_lib.default()
  with second.unlocked():
    second.update(json.loads(first.to_json()))
  one, two = (base.shape(c.model)[1] for c in (first, second))
  assert one == two and hash(one) == hash(two)
  assert two.windowed == (True, False, True, False)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'nonsense': 1}, 'nonsense is not known; there are family, vocab'),
    ({'activation': 'x'}, "activation is one of gelu.*; got 'x'"),
    ({'positions': 'x'}, "positions is one of rope, learned.*; got 'x'"),
    ({'kv_heads': 0}, 'kv_heads is at least 1 .*; got 0'),
    ({'kv_heads': 3}, 'kv_heads divides heads; got 3 and 4'),
    ({'layers': 0}, 'layers is at least 1 .*; got 0'),
    ({'layers': 2.5}, 'layers is a whole number; got 2.5'),
    ({'layers': True}, 'layers is a whole number; got True'),
    ({'window': -3}, 'window is at least 0 .*; got -3'),
    ({'eps': 'small'}, "eps is a number; got 'small'"),
    ({'tied': 1}, 'tied is True or False; got 1'),
    ({'head_dim': 5}, 'head_dim is even.*; got 5'),
    ({'d_model': 5, 'positions': 'sinusoidal'}, 'd_model is even.*; got 5'),
    (
      {'windowed': (True,)},
      'windowed has a value for each of the 4 layers; got 1',
    ),
    ({'windowed': 'all'}, "windowed is a list.*; got 'all'"),
    ({'windowed': (1, 1, 0, 0)}, 'windowed is True or False for each'),
    ({'rope': 'yarn'}, "rope is a mapping like .*; got 'yarn'"),
    ({'rope': {'kind': 'x'}}, "rope is one of default, .*; got 'x'"),
    ({'rope': {'base': 3}}, 'rope.base is not known; there are theta'),
    ({'rope': {'theta': 'x'}}, "rope.theta is a number; got 'x'"),
    ({'rope': {'factor': 0}}, 'rope.factor is at least 0.1 .*; got 0'),
    ({'heads': {'a': 1}}, "heads is a whole number; got {'a': 1}"),
    ({'dropout': 0.5}, 'dropout has no effect; set config.model.dropout'),
    ({'family': 'gemma'}, 'family has no effect; set config.model.family'),
  ],
)
def test_what_cannot_be_is_one_sentence_with_its_key(changes, said):
  with pytest.raises(ValueError, match=rf'^config\.model\.shape\.{said}') as e:
    shape(changes)
  assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'layers': 2}, 'layers is not known; there are vocab'),
    ({'encoder_layers': 0}, 'encoder_layers is at least 1 .*; got 0'),
    ({'activation': 'tanh'}, 'activation is one of'),
  ],
)
def test_t5s_shapes_are_looked_at_too(changes, said):
  with pytest.raises(ValueError, match=rf'^config\.model\.shape\.{said}'):
    shape(changes, family='t5')


def test_a_shape_of_a_model_that_is_read_is_refused():
  c = config_lib.default()
  c.model.shape.vocab = 7
  with pytest.raises(ValueError, match='defines its shape.*leave vocab out'):
    base.shape(c.model)


@pytest.mark.parametrize(
  'positions',
  [
    'learned',
    *(pytest.param(p, marks=pytest.mark.slow) for p in ('sinusoidal', 'alibi')),
  ],
)
def test_every_kind_of_positions_trains(tmp_path, positions):
  c = card({**SMALL, 'positions': positions, 'length': 97})
  c.objective, c.method, c.data.tokenizer = 'causal', 'full', 'bytes'
  c.steps, c.batch_size, c.data.length = 2, 3, 96
  c.log.every_steps = 1
  c.evaluation.before = c.evaluation.after = False
  c.evaluation.max_examples, c.evaluation.tasks = 3, 'stars'
  train.train(c, str(tmp_path))
  rows = read(str(tmp_path / 'metrics.jsonl'))
  assert [row['step'] for row in rows] == [1, 2]
  assert all(np.isfinite(row['loss']) for row in rows)


def count(*shape):
  """The command's exit code, its parameters and its error."""
  ran = commands.run(
    'moepeft.count',
    '--config=configs/pretrain_gpt_tiny.py',
    '--noflops',
    *('--config.model.family=gpt2', '--config.method=full'),
    *(f'--config.model.shape.{text}' for text in shape),
  )
  params = json.loads(ran.stdout)['params'] if ran.stdout else 0
  return ran.returncode, params, ran.stderr


def test_the_command_line_sets_any_field():
  code, learned, said = count('length=97', 'layers=1')
  assert code == 0, said
  code, alibi, said = count('positions=alibi', 'rope.kind=linear', 'layers=1')
  assert code == 0, said
  # The table of 97 positions, each of 128 features.
  assert learned - alibi == 97 * 128
  code, _, said = count('positions=spiral')
  assert code == 2
  assert said.startswith('error: config.model.shape.positions is one of')
