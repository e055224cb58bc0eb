# SPDX-License-Identifier: Apache-2.0
"""Tiny bases, pairs and configs of preference tuning, and the loop's parts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax

from moepeft import config as config_lib
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.hf import model as hf
from moepeft.core.types import State
from moepeft.data.batching import collators
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.models import FAMILIES
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params
from moepeft.objectives import OBJECTIVES, reference_model
from moepeft.objectives.batches import make_collator

from .contracts import small

T5 = dataclasses.replace(small.GATED, vocab=263)
LLAMA = dataclasses.replace(
  FAMILIES['llama'].config('tiny'),
  vocab=263,
  d_model=22,
  heads=2,
  kv_heads=1,
  head_dim=6,
  ffn=26,
  layers=2,
)
# At every site, compiling takes three times as long.
MOLORA = "molora(experts=3, rank=2, targets='*/q|*/wo')"
WORDS = 'sun moon star rain snow wind leaf root'.split()


def pairs(count):
  """Whatever is asked, 'yes' is better than 'no'; lengths differ."""
  return [
    {
      'prompt': f'{WORDS[i % 8]} {WORDS[i // 8 % 8]} {i}?',
      'chosen': 'yes' + '!' * (i % 3),
      'rejected': 'no' + '.' * (i % 4),
    }
    for i in range(count)
  ]


def written(folder):
  """{family: a base's directory, 'data': a file of pairs}."""
  for name, module, config in (
    ('llama', FAMILIES['llama'].module, LLAMA),
    ('t5', t5.T5, T5),
  ):
    batch = base_lib.example_batch()
    params = init_params(module(config), batch, 0)['params']
    hf.save(str(folder / name), config, params)
  (folder / 'pairs.json').write_text(json.dumps(pairs(45)))
  found = {name: str(folder / name) for name in ('llama', 't5')}
  return found | {'data': str(folder / 'pairs.json')}


def card(places, family='llama', **changes):
  c = config_lib.default()
  c.model.path, c.model.dropout = places[family], 0.0
  c.objective, c.method = 'dpo', MOLORA
  c.data.source, c.data.path = 'preference', places['data']
  c.data.tokenizer, c.data.length, c.data.validation_fraction = 'bytes', 31, 0.2
  c.data.inputs_length, c.data.targets_length = 23, 7
  c.steps, c.batch_size = 4, 6
  c.log.every_steps = 2
  c.log.trackers, c.log.plots = '', False
  c.checkpoint.every_steps = 2
  c.optimizer.learning_rate = 1e-2
  c.evaluation.before = c.evaluation.after = False
  c.evaluation.batch_size = 5
  with c.unlocked():
    c.update_from_flattened_dict(changes)
  return c


@dataclasses.dataclass
class Parts:
  """The parts of the training loop, without the loop."""

  config: object
  model: object
  built: object
  reference: object
  state: State
  batch: dict


def parts_of(config, optimizer=None):
  """As `train.train` makes them, and the first batch of the data."""
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  reference, adapters = None, {}
  if OBJECTIVES[config.objective].needs_reference:
    reference, adapters = reference_model.make_reference(
      config.preference.reference, model, built, base
    )
  variables = base_lib.initialise(base, model, 0)
  state = State(
    step=jnp.int32(0),
    trainable=variables['peft'],
    frozen=variables['params'],
    opt=(optimizer or optax.sgd(1.0)).init(variables['peft']),
    rng=jax.random.key(0),
    reference=adapters,
  )
  own = collators.make_model_collator(
    config.data, ByteTokenizer(), base.config, 0
  )
  own = make_collator(config, own)
  items = preference_dataset.read_preferences(config.data, own).items
  batch = own.pad(items[: config.batch_size])
  batch = {key: jnp.asarray(array) for key, array in batch.items()}
  return Parts(config, model, built, reference, state, batch)


def noisy(state, scale):
  """The state with an adapter off its start."""
  return state.replace(trainable=small.moved(state.trainable, scale, 0))
