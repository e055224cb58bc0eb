# SPDX-License-Identifier: Apache-2.0
"""A router's own figures and losses, summed over real tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Routing
from moepeft.moe import ROUTERS, aux_losses, router_stats
from moepeft.moe.router import RouterLoss, RouterSpec
from moepeft.moe.routers.softmax import Softmax


class Squared(nn.Module):
  """Softmax routing that reports the squares of its logits."""

  experts: int = 1

  @nn.compact
  def __call__(self, x, ctx):
    routing = Softmax(self.experts, name='softmax')(x, ctx)
    return routing.replace(aux={'square': routing.logits**2})


def mean_square(stats):
  return jnp.mean(stats.aux['square'] / stats.count[..., None])


@pytest.fixture
def registered():
  entry = RouterSpec(
    Squared, losses={'square': RouterLoss(mean_square, reads=('square',))}
  )
  ROUTERS.register('squared', entry)
  yield
  del ROUTERS._entries['squared']


def test_sums_leave_padding_out():
  logits = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
  mask = jnp.array([[True, False]])
  routing = Routing(logits, jax.nn.softmax(logits), aux={'square': logits**2})
  stats = router_stats.router_stats(routing, mask)
  np.testing.assert_array_equal(stats.aux['square'], [1.0, 4.0])


def test_a_loss_is_the_mean_over_the_sites_that_report_its_figures(registered):
  logits = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
  routing = Routing(logits, jax.nn.softmax(logits), aux={'square': logits**2})
  sites = {
    'a': router_stats.router_stats(routing, None),
    'b': router_stats.router_stats(routing.replace(aux={}), None),
  }
  # (1 + 4 + 9 + 16) / 4 of site a alone, weighted by 2.
  loss = aux_losses.auxiliary_loss(sites, {'square': 2.0})
  np.testing.assert_allclose(loss, 15.0, rtol=1e-6)


def test_an_unknown_loss_is_refused_with_the_known_ones():
  with pytest.raises(
    ValueError, match='z, entropy, .*; got config.router_losses.square'
  ):
    aux_losses.auxiliary_loss({}, {'square': 1.0})


def test_the_loss_of_a_mixture_under_scan_has_a_gradient(registered):
  from tests.contracts import small_decoders

  method = "molora(experts=3, rank=2, router=squared, targets='*/self/q|*/wo')"
  config = small_decoders.CONFIGS['gpt2']
  model, variables = small_decoders.make(config, method, 0.1)

  def loss(peft):
    _, collections = model.apply(
      {**variables, 'peft': peft},
      small_decoders.batch(),
      mutable=['routing'],
    )
    sites = router_stats.collect(collections['routing'])
    return aux_losses.auxiliary_loss(sites, {'square': 1.0})

  gradient = jax.jit(jax.grad(loss))(variables['peft'])
  q = gradient['decoder']['layers']['self']['q']['molora']
  assert float(jnp.abs(q['router']['softmax']['kernel']).min(axis=0).max()) > 0


@pytest.mark.parametrize(
  ('weights', 'message'),
  [
    (
      {'lod_balance': 1.0},
      "config.router_losses.lod_balance; did you mean 'lo",
    ),
    ({'z': 'much'}, "config.router_losses.z is at least -1,000.*got 'much'"),
    ({'z': 5_000.0}, 'config.router_losses.z is at least -1,000'),
  ],
)
def test_wrong_weights_are_refused_by_name(weights, message):
  with pytest.raises(ValueError, match=message):
    aux_losses.check_weights(weights)
