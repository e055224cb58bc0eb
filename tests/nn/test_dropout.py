# SPDX-License-Identifier: Apache-2.0
"""Places and rate of dropout, which layers do not share."""

import collections
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.checkpoints import base as base_lib
from moepeft.core.types import Context
from moepeft.models.t5 import model as t5
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.attention import Core, Heads
from moepeft.nn.initializers import init_params
from moepeft.nn.linear import base_projection
from moepeft.nn.mlp import Mlp
from moepeft.nn.scan_layers import scan_layers
from moepeft.peft import build

from ..contracts import small

TRAIN = Context(train=True)
RNGS = {'dropout': jax.random.key(0), 'router': jax.random.key(1)}


def draws(jaxpr, times=1):
  """The number of draws of random bits, all layers of a scan counted."""
  actual = 0
  for eqn in jaxpr.eqns:
    inside = times
    if eqn.primitive.name == 'scan':
      inside *= eqn.params['length']
    actual += times * (eqn.primitive.name == 'random_bits')
    for value in eqn.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        actual += draws(inner, inside)
  return actual


def draws_of_t5(dropout, train):
  config = dataclasses.replace(small.GATED, dropout=dropout)
  variables = small.variables('full')

  def run(rngs):
    return t5.T5(config).apply(variables, small.batch(), train=train, rngs=rngs)

  return draws(jax.make_jaxpr(run)(RNGS).jaxpr)


def test_t5_drops_at_all_its_places_in_training_and_nowhere_else():
  # A layer: the weights and the output of each attention, the hidden units
  # and the output of the feed-forward. A stack: what goes in and comes out.
  encoder = 2 * (1 * 2 + 2) + 2
  decoder = 3 * (2 * 2 + 2) + 2
  assert draws_of_t5(0.5, train=True) == encoder + decoder
  assert draws_of_t5(0.5, train=False) == 0
  assert draws_of_t5(0.0, train=True) == 0


def test_the_rate_of_the_config_is_the_rate_of_the_model():
  config = config_lib.default()
  config.model.dropout = 0.3
  config.model.family = 't5'
  for path in ('', 'package:t5_tiny'):
    config.model.path = path
    _, shape = base_lib.shape(config.model)
    base = base_lib.load(config.model)
    model, _ = base_lib.module(base, config)
    assert shape.dropout == base.config.dropout == model.config.dropout == 0.3


def test_attention_drops_weights_and_makes_up_for_it():
  # Every weight is 1/7 and every value 1: what is left is a number k of kept
  # weights, k / 7 / (1 - 0.2).
  ones = jnp.ones((2, 7, 3, 5))
  heads = Heads(0 * ones, ones, ones)
  core = Core('core', AdapterMap(), dropout=0.2)
  y = np.asarray(core.apply({}, heads, TRAIN, rngs=RNGS))
  remaining = y * 7 * 0.8
  np.testing.assert_allclose(remaining, np.round(remaining), atol=1e-5)
  # All of a head's features are of the same weights, 42 of them 7 draws each:
  # 294 draws, whose mean is good to 0.023; four deviations.
  np.testing.assert_array_equal(y, np.broadcast_to(y[..., :1], y.shape))
  assert abs(np.mean(remaining) / 7 - 0.8) < 0.094
  quiet = core.apply({}, heads, Context())
  np.testing.assert_allclose(quiet, 1, rtol=1e-6)


def test_the_feed_forward_drops_hidden_units_and_makes_up_for_it():
  # With an identity for wo, an output is its hidden unit.
  mlp = Mlp(11, 11, False, 'relu', 'mlp', AdapterMap(), dropout=0.2)
  eye = {'kernel': jnp.eye(11)}
  params = {'wi': eye, 'wo': eye}
  x = jnp.ones((2, 7, 11))
  y = np.asarray(mlp.apply({'params': params}, x, TRAIN, rngs=RNGS))
  assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(0.8)}
  np.testing.assert_array_equal(mlp.apply({'params': params}, x, Context()), x)


ADAPTERS = {
  'lora(rank=11, alpha=11.0, dropout=0.2)': (),
  # One expert, whose weight is 1.
  'molora(experts=1, rank=11, alpha=11.0, dropout=0.2)': (1,),
}


@pytest.mark.parametrize('method', ADAPTERS)
def test_an_adapter_drops_its_own_input_and_not_the_frozen_one(method):
  # A and B are identities and the scale is 1: f(x) is 3 x, and the term is x
  # where it is kept, made up for.
  (adapter,) = build(method, {'q': 'query'}).adapter_map.at('q')
  experts = ADAPTERS[method]
  tree = {
    'a': jnp.eye(11).reshape(11, *experts, 11),
    'b': jnp.eye(11).reshape(*experts, 11, 11),
    'router': {'kernel': jnp.zeros((11, 1))},
  }
  f = base_projection('btd,df->btf', 3 * jnp.eye(11), jnp.float32)
  x = jnp.ones((2, 7, 11))
  y = np.asarray(adapter.apply({'peft': tree}, f, x, TRAIN, rngs=RNGS))
  counts = collections.Counter(np.round(y.reshape(-1), 4).tolist())
  assert set(counts) == {3.0, 4.25}
  # 154 draws: the share is good to 0.032; four deviations.
  assert abs(counts[3.0] / 154 - 0.2) < 0.13
  quiet = adapter.apply({'peft': tree}, f, x, Context())
  np.testing.assert_array_equal(quiet, 4 * x)


class Draw(nn.Module):
  """Reports a draw of one rng."""

  rng: str

  @nn.compact
  def __call__(self, x, ctx):
    drawn = jax.random.uniform(self.make_rng(self.rng))
    self.sow('weights', 'drawn', drawn)
    return x


class Stacked(nn.Module):
  rng: str
  scan: bool

  @nn.compact
  def __call__(self, x):
    block = Draw(self.rng, parent=None)
    return scan_layers(block, 5, x, TRAIN, scan=self.scan)


@pytest.mark.parametrize('scan', [True, False], ids=['scan', 'loop'])
@pytest.mark.parametrize('rng', ['dropout', 'router'])
def test_layers_do_not_share_noise(rng, scan):
  _, seen = Stacked(rng, scan).apply(
    {}, jnp.zeros(3), rngs=RNGS, mutable=['weights']
  )
  drawn = np.concatenate([np.ravel(a) for a in jax.tree.leaves(seen)])
  assert len(set(drawn.tolist())) == 5


def test_layers_do_not_share_first_weights():
  # Drawn by Flax and on the host.
  model, _ = small.make("lora(rank=3, targets='*/q')")
  drawn = [
    jax.jit(model.init)(small.RNGS, small.batch()),
    init_params(model, small.batch(), 0),
  ]
  for variables in drawn:
    for path in (('params', 'kernel'), ('peft', 'lora', 'a')):
      q = variables[path[0]]['decoder']['layers']['self']['q']
      for key in path[1:]:
        q = q[key]
      assert len({np.asarray(layer).tobytes() for layer in q}) == 3
