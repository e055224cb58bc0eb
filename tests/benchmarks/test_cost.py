# SPDX-License-Identifier: Apache-2.0
"""FLOPs and bytes of a training step, read from the compiled program."""

import jax
import jax.numpy as jnp
import pytest

from moepeft.models.t5 import model as t5
from moepeft.objectives import seq2seq
from moepeft.objectives.cross_entropy import (
  CrossEntropySettings,
  mean_loss,
  token_nll_and_loss,
)
from moepeft.peft import build

# So wide that all that is no product is less than a projection's gradient.
SHAPE = t5.T5Config(
  vocab=1031,
  d_model=1024,
  heads=3,
  head_dim=512,
  ffn=1033,
  encoder_layers=1,
  decoder_layers=1,
  dropout=0.0,
)
B, S, T = 1, 11, 7


def compiled_flops(method, trained):
  model = t5.T5(SHAPE, build(method, t5.sites(SHAPE)).adapter_map, scan=False)
  ids = {
    'inputs': jax.ShapeDtypeStruct((B, S), jnp.int32),
    'decoder_inputs': jax.ShapeDtypeStruct((B, T), jnp.int32),
    'targets': jax.ShapeDtypeStruct((B, T), jnp.int32),
    'inputs_mask': jax.ShapeDtypeStruct((B, S), bool),
    'targets_mask': jax.ShapeDtypeStruct((B, T), bool),
  }
  keys = dict.fromkeys(('params', 'peft'), jax.random.key(0))
  variables = dict(jax.eval_shape(model.init, keys, ids))

  def loss(own, rest, batch):
    actual = seq2seq.loss_sums(model.apply, {**rest, trained: own}, batch, None)
    return mean_loss(*actual)

  own = variables.pop(trained)
  step = jax.jit(jax.grad(loss)).lower(own, variables, ids).compile()
  return step.cost_analysis()['flops']


def products(full):
  """FLOPs of the base's products: 2 a weight and token forward, 2 backward
  through the activations, and 2 for the weight's gradient where `full`."""
  d, nh, f, v = 1024, 3 * 512, 1033, 1031
  # Each side's own q, k, v, o and feed-forward; cross-attention projects
  # inputs by k and v, targets by q and o.
  of_inputs = 4 * d * nh + 3 * d * f + 2 * d * nh
  of_targets = of_inputs + d * v
  weights = S * of_inputs + T * of_targets
  # Two products, 2 FLOPs each, forward, and four backward.
  attention = 3 * 4 * (S * S + T * T + T * S) * nh
  if full:
    return 6 * weights + attention
  # Below the lowest adapters, of k and v, nothing is trained: no gradient goes
  # through q, k and v to the embedded tokens, nor to q.
  below = 2 * (S + T) * 3 * d * nh + 2 * (S * S + T * T) * nh
  return 4 * weights + attention - below


@pytest.mark.parametrize(
  ('method', 'trained'), [('ia3', 'peft'), ('full', 'params')]
)
def test_frozen_weights_have_no_gradient(method, trained):
  # Of one tensor, the smallest: the head's.
  smallest = 2 * T * 1024 * 1031
  more = compiled_flops(method, trained) - products(full=trained == 'params')
  # Norms, activations and softmaxes; a single gradient would be over it.
  assert 0 <= more < 0.5 * smallest


def test_logits_are_held_once():
  # The head and its loss alone: [b, t, v] is all that is large.
  b, t, d, v = 2, 96, 7, 1009
  x, w = jax.ShapeDtypeStruct((b, t, d), jnp.float32), jnp.ones((d, v))
  targets = jnp.zeros((b, t), jnp.int32)

  def loss(x):
    logits = jnp.einsum('btd,dv->btv', x, w)
    _, losses = token_nll_and_loss(
      logits, targets, CrossEntropySettings(z_loss=1e-4)
    )
    return jnp.sum(losses), jnp.sum(jnp.argmax(logits, axis=-1))

  step = jax.jit(jax.grad(loss, has_aux=True)).lower(x).compile()
  stored = step.memory_analysis().temp_size_in_bytes
  logits = 4 * b * t * v
  # Blocks of 16 of the 96 tokens are written in place, one at a time.
  assert logits <= stored < 1.5 * logits


@pytest.mark.slow
def test_remat_saves_memory_where_layers_are_written_out():
  shape = t5.T5Config(
    vocab=31,
    d_model=64,
    heads=3,
    head_dim=16,
    ffn=257,
    encoder_layers=5,
    decoder_layers=1,
    dropout=0.0,
  )
  advice = build('ia3', t5.sites(shape)).adapter_map
  ids = {
    'inputs': jnp.zeros((7, 61), jnp.int32),
    'decoder_inputs': jnp.zeros((7, 3), jnp.int32),
    'targets': jnp.zeros((7, 3), jnp.int32),
    'targets_mask': jnp.ones((7, 3), bool),
  }

  def held(remat):
    model = t5.T5(shape, advice, remat=remat, unroll=5)
    keys = dict.fromkeys(('params', 'peft'), jax.random.key(0))
    variables = dict(jax.eval_shape(model.init, keys, ids))

    def loss(peft, params):
      own = {'peft': peft, 'params': params}
      return mean_loss(*seq2seq.loss_sums(model.apply, own, ids, None))

    step = jax.jit(jax.grad(loss)).lower(variables['peft'], variables['params'])
    return step.compile().memory_analysis().temp_size_in_bytes

  # Five layers' activations against their inputs and one layer's activations;
  # merged with what they recompute, the layers would need as much as without.
  assert held('full') < 0.6 * held('none')
