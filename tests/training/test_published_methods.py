# SPDX-License-Identifier: Apache-2.0
"""Every method of the registry learns on a T5 and on a decoder.

30 steps on one batch: the loss ends below the frozen base's, and below that of
a control which was trained on the labels of other rows.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft import config as config_lib
from moepeft.core.types import State
from moepeft.models.decoder import model as decoder
from moepeft.moe import router_state
from moepeft.nn.initializers import init_params
from moepeft.objectives import build_objective
from moepeft.peft import METHODS, build
from moepeft.peft.prefix import model_prefix_ids
from moepeft.training.setup import build_train_step

from ..contracts import small, small_decoders

STEPS, ROWS = 30, 6
# Small forms of the presets; others are found in METHODS by their name.
SMALL = {
  'mixture': 'mixture(expert=lora(rank=2), experts=3)',
  'flylora': 'flylora(experts=6, router=magnitude(k=2))',
  'tokens': "tokens(new='3-9')",
  'moelora': "moelora(router=task(tasks=['a', 'b']))",
  'poly': "poly(rank=2, router=poly(tasks=['a', 'b']))",
  'mhr': "mhr(rank=2, router=poly(tasks=['a', 'b'], splits=2))",
}
# Mixtures of adapters that are trained already.
UNTRAINED = ('arrow', 'phatgoose')
# It routes by a first pass of a decoder-only model.
UNBUILT = (('xlora', 't5'),)
FAST = (('hydralora', 'decoder'),)


def t5_batch():
  return small.batch(rows=ROWS)


def decoder_batch():
  rng = np.random.default_rng(0)
  ids = rng.integers(2, 37, (ROWS, 9)).astype(np.int32)
  mask = np.broadcast_to(np.arange(8) >= 4, (ROWS, 8))
  return {
    'inputs': jnp.asarray(ids[:, :-1]),
    'inputs_mask': jnp.ones((ROWS, 8), bool),
    'inputs_tasks': jnp.asarray(
      np.full((ROWS, 8), 1) + np.arange(ROWS)[:, None] % 2
    ),
    'targets': jnp.asarray(ids[:, 1:]),
    'targets_mask': jnp.asarray(mask),
  }


def behind_prompt(batch, ids):
  """The batch with placeholders before its inputs."""
  sides = ('inputs',) if 'decoder_inputs' in batch else ('inputs', 'targets')
  # The mask of a decoder's targets is False on a prompt.
  longer = {
    key: jnp.pad(array, ((0, 0), (len(ids), 0)), mode='edge')
    for key, array in batch.items()
    if key.startswith(sides)
  }
  inputs = longer['inputs'].at[:, : len(ids)].set(np.array(ids, np.int32))
  return batch | longer | {'inputs': inputs}


def make_decoder(method):
  built = build(method, decoder.sites(LLAMA))
  return decoder.Decoder(LLAMA, built.adapter_map), built


LLAMA = small_decoders.CONFIGS['llama']
FAMILIES = {
  't5': (small.make, small.params, t5_batch, 'seq2seq'),
  'decoder': (
    make_decoder,
    lambda: small_decoders.make(LLAMA)[1]['params'],
    decoder_batch,
    'causal',
  ),
}


def trained_loss(name, family, shuffled):
  """(loss of the base, loss after training on own or others' labels)."""
  make, params, batch_of, objective = FAMILIES[family]
  model, built = make(SMALL.get(name, name))
  config = config_lib.default()
  config.objective, config.batch_size = objective, ROWS
  batch = behind_prompt(batch_of(), model_prefix_ids(model))
  optimizer = built.wrap_optimizer(optax.adam(1e-2), STEPS)
  collections = init_params(model, batch, 1, params())
  trainable = collections[built.trainable]
  frozen = collections['params' if built.trainable == 'peft' else 'peft']
  init = router_state.optimizer_init(optimizer, built.frozen_arrays)
  state = State(
    step=jnp.int32(0),
    trainable=trainable,
    frozen=frozen,
    opt=init(trainable),
    rng=jax.random.key(0),
  )
  others = {
    key: jnp.roll(array, 1, axis=0) if key.startswith('targets') else array
    for key, array in batch.items()
  }
  step = jax.jit(build_train_step(config, model, built, optimizer))
  objective = build_objective(config, None)

  @jax.jit
  def loss(state):
    total, sums = objective(model.apply, built.variables(state), batch, None)
    return total / sums['weight']

  before = float(loss(state))
  for _ in range(STEPS):
    state, _ = step(state, others if shuffled else batch)
  return before, float(loss(state))


@pytest.mark.parametrize(
  ('name', 'family'),
  [
    pytest.param(name, family, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(METHODS, FAMILIES)
    for name, family in [case]
    if name not in UNTRAINED and case not in UNBUILT
  ],
)
def test_a_method_learns_what_its_labels_say(name, family):
  before, after = trained_loss(name, family, shuffled=False)
  _, control = trained_loss(name, family, shuffled=True)
  assert after < before and after < control
