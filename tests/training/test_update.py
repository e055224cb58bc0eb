# SPDX-License-Identifier: Apache-2.0
"""One update by hand, on a model of one site: router losses, fresh noise."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft import config as config_lib
from moepeft.core.types import Context, Routing, State
from moepeft.moe import aux_losses, router_stats
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.initializers import init_params
from moepeft.nn.linear import Linear
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.objectives.seq2seq import loss_sums
from moepeft.peft import build
from moepeft.training.setup import build_train_step

from ..contracts import small

VOCAB = 37
MOLORA = 'molora(experts=3, rank=2)'
MOV = 'mov(experts=3)'
BATCH = small.batch()


class Projection(nn.Module):
  """Logits of each token from the one before it, by one adapted matrix."""

  adapter_map: AdapterMap

  @nn.compact
  def __call__(self, batch, train=False):
    ctx = Context(
      token_mask=batch.get(
        'targets_mask', jnp.ones(batch['decoder_inputs'].shape, bool)
      ),
      train=train,
    )
    x = jax.nn.one_hot(batch['decoder_inputs'], VOCAB)
    head = Linear('btd,df->btf', (VOCAB, VOCAB), 'head', self.adapter_map, 0.5)
    return head(x, ctx)


@functools.cache
def make(method, noise=0.0):
  """(model, built, variables); `noise` moves the adapter off its start."""
  built = build(method, {'head': 'query'})
  model = Projection(built.adapter_map)
  variables = init_params(model, {'decoder_inputs': BATCH['decoder_inputs']}, 0)
  peft = small.moved(variables['peft'], noise, 0)
  return model, built, {**variables, 'peft': peft}


@functools.cache
def evaluated(method, noise):
  """The sums of the losses of a batch, without noise."""
  model, _, variables = make(method, noise)
  return jax.jit(lambda v: loss_sums(model.apply, v, BATCH, None))(variables)


def make_state(variables, optimizer):
  return State(
    step=jnp.int32(0),
    trainable=variables['peft'],
    frozen=variables['params'],
    opt=jax.jit(optimizer.init)(variables['peft']),
    rng=jax.random.key(0),
  )


def update(method, optimizer, noise=0.0, **router_losses):
  """(the jitted update, a fresh state) of a method."""
  model, built, variables = make(method, noise)
  config = config_lib.default()
  config.router_losses.update(router_losses)
  run = jax.jit(build_train_step(config, model, built, optimizer))
  return run, make_state(variables, optimizer)


def adapter(state):
  """The one site's own tree."""
  tree = state.trainable
  while 'a' not in tree:
    (tree,) = tree.values()
  return tree


@pytest.mark.parametrize('name', aux_losses.LOSSES)
def test_a_router_loss_moves_the_router_by_its_own_gradient(name):
  # B is zero at first, so the mean loss does not depend on the router: all of
  # the router's gradient is the router loss's.
  run, state = update(MOLORA, optax.sgd(2.0), **{name: 0.5})
  after, aux = run(state, BATCH)
  x = jax.nn.one_hot(BATCH['decoder_inputs'], VOCAB)

  def loss(kernel):
    logits = jnp.einsum('btd,de->bte', x, kernel, precision='highest')
    routing = Routing(logits, jax.nn.softmax(logits))
    sums = router_stats.router_stats(routing, BATCH['targets_mask'])
    return aux_losses.LOSSES[name](sums)

  before = adapter(state)['router']['kernel']
  value, slope = jax.jit(jax.value_and_grad(loss))(before)
  # Float32 rounding of a value near one, before the rate and the weight.
  np.testing.assert_allclose(aux['router_loss'], 0.5 * value, rtol=1e-6)
  moved = np.asarray(adapter(after)['router']['kernel']) - np.asarray(before)
  assert np.abs(slope).max() > 1e-5
  np.testing.assert_allclose(moved, -2.0 * 0.5 * slope, atol=1e-7)


def test_without_router_losses_a_router_waits_for_its_experts():
  run, state = update(MOLORA, optax.sgd(2.0))
  after, aux = run(state, BATCH)
  assert float(aux['router_loss']) == 0
  one, two = adapter(state), adapter(after)
  np.testing.assert_array_equal(
    one['router']['kernel'], two['router']['kernel']
  )
  # The update did something: B is what gets a gradient first.
  assert np.abs(two['b']).max() > 0 == np.abs(one['b']).max()


def test_an_update_descends_the_mean_loss_and_counts():
  run, state = update(MOLORA, optax.sgd(0.1), noise=0.1)
  expected = mean_loss(*evaluated(MOLORA, 0.1))
  after, aux = run(state, BATCH)
  # No noise here: the loss of training is that of evaluation.
  np.testing.assert_allclose(aux['loss'], expected, rtol=1e-6)
  assert int(after.step) == 1
  _, later = run(after, BATCH)
  assert float(later['loss']) < float(aux['loss'])
  # The rate times the norm of the gradient is how far SGD goes.
  moved = jax.tree.map(np.subtract, after.trainable, state.trainable)
  np.testing.assert_allclose(
    optax.global_norm(moved), 0.1 * aux['gradient_norm'], rtol=1e-4
  )


NOISY = {
  'lora(rank=2, dropout=0.5)': 'lora(rank=2)',
  'molora(experts=3, rank=2, dropout=0.5)': MOLORA,
  'molora(experts=3, rank=2, router=softmax(jitter=0.5))': MOLORA,
  'molora(experts=3, rank=2, router=softmax(dropout=0.5))': MOLORA,
}


@pytest.mark.parametrize('method', NOISY)
def test_every_step_has_noise_of_its_own_which_the_seed_decides(method):
  run, state = update(method, optax.sgd(0.0), noise=0.5)
  first, aux = run(state, BATCH)
  again = run(state, BATCH)[1]
  other = run(state.replace(rng=jax.random.key(1)), BATCH)[1]
  # The rate is zero, so nothing but the noise tells the steps apart.
  second = run(first, BATCH)[1]
  assert float(aux['loss']) == float(again['loss'])
  assert float(aux['loss']) != float(second['loss'])
  assert float(aux['loss']) != float(other['loss'])
  assert float(second['loss']) != float(other['loss'])


@pytest.mark.parametrize('method', NOISY)
def test_noise_is_off_in_evaluation(method):
  # Evaluation gets no rngs at all; noise that were on would ask for one.
  actual, expected = (evaluated(m, 0.5)[0] for m in (method, NOISY[method]))
  assert float(actual) == float(expected)


@pytest.mark.slow
def test_a_step_in_bfloat16_is_near_that_in_float32():
  optimizer = optax.adam(0.01)
  config = config_lib.default()
  actual = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    model, built = small.make(MOV, dtype=dtype)
    state = make_state(small.variables(MOV, noise=0.1), optimizer)
    run = jax.jit(build_train_step(config, model, built, optimizer))
    after, aux = run(state, BATCH)
    # Adapters, moments, losses and routing sums stay float32.
    sums = aux['loss'], aux['total'], aux['nll'], aux['routing']
    leaves = jax.tree.leaves((after.trainable, after.opt, sums))
    assert {a.dtype for a in leaves} == {np.dtype('float32'), np.dtype('int32')}
    actual[dtype] = aux
  # bfloat16 has 8 bits, so that every operation errs by 2^-9 of its result; of
  # 40 such batches, whose losses are near 4, none moved by more than 0.008.
  one, two = (actual[d]['loss'] for d in (jnp.float32, jnp.bfloat16))
  np.testing.assert_allclose(two, one, atol=0.02)
  assert float(one) != float(two)
  # A loss that were computed in bfloat16 would be a multiple of 2^-6.
  assert float(two) * 2**6 % 1 != 0
