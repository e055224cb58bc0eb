# SPDX-License-Identifier: Apache-2.0
"""The seam holds what comes later: DoRA, prefixes, mixtures of sublayers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft.models.t5 import model as t5
from moepeft.moe import router_stats
from moepeft.nn.initializers import init_params
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.objectives.seq2seq import loss_sums
from moepeft.peft import build

from . import answers, small
from .probes import PROBES

METHODS = {
  'dora': "dora(targets='*/q|*/wo')",
  'prefix': 'prefix',
  'mixture': "lora(rank=2, targets='*/wi_0|*/wo') + mixture",
}


def make(name, **options):
  built = build(METHODS[name], t5.sites(small.GATED), methods=PROBES)
  model = t5.T5(small.GATED, built.adapter_map, **options)
  return model, _variables(model)


@functools.cache
def _variables(model):
  return init_params(model, small.batch(), 0)


@pytest.mark.parametrize(
  'remat', ['full', pytest.param('none', marks=pytest.mark.slow)]
)
# A method of the registry is what became of the probe of DoRA.
@pytest.mark.parametrize(
  'name', small.others_slow(METHODS, quick=('prefix', 'mixture'))
)
def test_a_probe_trains_under_scan_remat_and_jit(name, remat):
  model, variables = make(name, remat=remat)
  optimizer = optax.adam(0.02)

  @jax.jit
  def update(peft, opt):
    def loss(peft):
      return mean_loss(
        *loss_sums(
          model.apply, {**variables, 'peft': peft}, small.batch(), None
        )
      )

    value, gradient = jax.value_and_grad(loss)(peft)
    changes, opt = optimizer.update(gradient, opt)
    return optax.apply_updates(peft, changes), opt, value

  peft, opt = variables['peft'], optimizer.init(variables['peft'])
  losses = []
  for _ in range(20):
    peft, opt, value = update(peft, opt)
    losses.append(float(value))
  assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
  'name', small.others_slow(('dora', 'mixture'), quick=('mixture',))
)
def test_a_probe_starts_at_the_base(name):
  model, variables = make(name)
  base = small.jitted(t5.T5(small.GATED))(
    {'params': variables['params']}, small.batch()
  )
  # Sums of weights that add to one, and a norm divided by itself.
  np.testing.assert_allclose(
    small.jitted(model)(variables, small.batch()), base, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('name', METHODS)
def test_a_probe_leaves_params_alone(name):
  _, variables = make(name)
  expected = small.variables('full')['params']
  assert jax.tree.structure(variables['params']) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, variables['params'], expected)


def test_experts_of_a_sublayer_may_be_noisy_routed_mixtures():
  noisy = (
    "molora(experts=2, rank=2, router=softmax(jitter=0.5), targets='*/wi_0')"
    ' + mixture'
  )
  built = build(noisy, t5.sites(small.GATED), methods=PROBES)
  model = t5.T5(small.GATED, built.adapter_map)
  variables = init_params(model, small.batch(), 0, small.params())
  rngs = {'dropout': jax.random.key(0), 'router': jax.random.key(1)}
  shape = jax.eval_shape(
    lambda: model.apply(variables, small.batch(), train=True, rngs=rngs)
  )
  assert shape.shape == (3, 5, 37)


def test_experts_of_a_sublayer_have_adapters_of_their_own():
  model, variables = make('mixture')
  layers = variables['peft']['encoder']['layers']
  # Two layers, three experts, d 11, rank 2.
  assert layers['mlp']['wi_0']['lora']['a'].shape == (2, 3, 11, 2)
  assert layers['around_mlp']['mixture']['router']['kernel'].shape == (2, 11, 3)
  collect = functools.partial(model.apply, mutable=['routing'])
  _, seen = jax.jit(collect)(variables, small.batch())
  actual = router_stats.collect(seen['routing'])
  assert set(actual) == {
    f'{side}/layers/around_mlp/mixture' for side in ('encoder', 'decoder')
  }


@pytest.mark.slow
def test_a_prefix_works_in_cached_decoding():
  model, variables = make('prefix')
  prompts = small.batch()['inputs'].tolist()
  tokens = answers.engine_greedy(model, variables, prompts, 6)
  for prompt, answer in zip(prompts, tokens, strict=True):
    expected = answers.uncached_greedy(model, variables, prompt, 6)
    assert answer == expected


def test_full_weights_leave_a_layer_on_request_only():
  model, _ = small.make('molora(experts=3, rank=2)')
  variables = small.variables('molora(experts=3, rank=2)')

  def collect(name):
    apply = functools.partial(model.apply, mutable=[name])
    return jax.eval_shape(apply, variables, small.batch())[1]

  assert set(collect('routing')) == {'routing'}
  seen = collect('weights')
  shapes = {a.shape for a in jax.tree.leaves(seen['weights'])}
  # Layers, rows, inputs or targets, experts.
  assert shapes == {(2, 3, 7, 3), (3, 3, 5, 3), (3, 3, 7, 3)}


def test_a_given_routing_replaces_the_router():
  from moepeft.core.types import Context, Routing
  from moepeft.nn.linear import base_projection
  from moepeft.peft.methods.lora import Lora
  from moepeft.peft.mixture import Mixture

  x = jax.random.normal(jax.random.key(0), (2, 3, 5))
  f = base_projection('btd,df->btf', jnp.ones((5, 7)), jnp.float32)
  # Of two layers; this is the second.
  weights = jnp.array([[1.0, 0.0], [0.0, 1.0]])
  one_hot = jnp.broadcast_to(weights[:, None, None], (2, 2, 3, 2))
  module = Mixture(Lora(rank=2), experts=2)
  given = Context(routing=Routing(one_hot, one_hot), layer=jnp.int32(1))
  variables = {
    'peft': {
      'a': jax.random.normal(jax.random.key(1), (5, 2, 2)),
      'b': jax.random.normal(jax.random.key(2), (2, 2, 7)),
    }
  }
  y = module.apply(variables, f, x, given)
  second = x @ variables['peft']['a'][:, 1] @ variables['peft']['b'][1]
  np.testing.assert_allclose(y, f(x) + 8 * second, rtol=1e-4, atol=1e-4)
