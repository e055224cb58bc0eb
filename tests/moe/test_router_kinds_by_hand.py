# SPDX-License-Identifier: Apache-2.0
"""What makes each router its method, in numbers derived by hand.

A router reads one token x = 1 with one feature, or logits as features through
the identity, so that kernels are logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context, Routing
from moepeft.moe import ROUTERS, aux_losses
from moepeft.moe.router_stats import router_stats
from moepeft.moe.routers.entropy_adaptive import tsallis_entropy
from moepeft.moe.routers.sparsegen import lower_bound, sparsegen
from tests.contracts.router_cases import context, make

EVALUATION, TRAIN = Context(), Context(train=True)


def route(name, logits, ctx=EVALUATION, rngs=None, **options):
  """The Routing of tokens with the logits [t, e]."""
  x = jnp.asarray(logits, jnp.float32)[None]
  router = ROUTERS[name].module(experts=x.shape[-1], **options)
  peft = {'kernel': jnp.eye(x.shape[-1])}
  return jax.jit(router.apply)({'peft': peft}, x, ctx, rngs=rngs)


def logs(*p):
  return np.log(np.array(p))


def test_top_p_takes_the_fewest_experts_that_reach_the_sum():
  # Sorted: 0.5, 0.25, 0.15, 0.1. 0.5 + 0.25 < 0.8 <= 0.9, three experts; the
  # second token's first has 0.85 alone.
  tokens = [logs(0.25, 0.1, 0.5, 0.15), logs(0.05, 0.85, 0.05, 0.05)]
  weights = route('top_p', tokens).combine_weights[0]
  np.testing.assert_allclose(weights[0], [0.25, 0, 0.5, 0.15], rtol=1e-6)
  np.testing.assert_allclose(weights[1], [0, 0.85, 0, 0], rtol=1e-6)
  weights = route('top_p', tokens, renormalize=True).combine_weights[0]
  np.testing.assert_allclose(
    weights[0], [0.25 / 0.9, 0, 0.5 / 0.9, 0.15 / 0.9], rtol=1e-6
  )


def test_sigmoid_gates_do_not_compete():
  # sigmoid(ln 3) = 3 / 4 and sigmoid(0) = 1 / 2, whatever stands beside them.
  weights = route('sigmoid', [[np.log(3), 0], [np.log(3), 9]]).combine_weights
  np.testing.assert_allclose(weights[0, 0], [0.75, 0.5], rtol=1e-6)
  np.testing.assert_allclose(weights[0, 1, 0], 0.75, rtol=1e-6)


def test_relu_gates_are_the_positive_scores_and_their_sum_the_loss():
  routing = route('relu', [[2.0, -1.0, 0.5], [-1.0, -2.0, -3.0]])
  np.testing.assert_array_equal(
    routing.combine_weights[0], [[2, 0, 0.5], [0, 0, 0]]
  )
  # (2.5 + 0) / 2
  np.testing.assert_allclose(loss_of(routing, 'relu_l1'), 1.25)


def loss_of(routing, name):
  sums = jax.jit(router_stats)(routing, None)
  return aux_losses.auxiliary_loss({'a': sums}, {name: 1.0})


def slope(name, **options):
  """The gradient of logits (ln 3, 0) where expert 0's weight is the loss."""

  def loss(logits):
    routing = route(
      name, logits[None], EVALUATION, {'router': jax.random.key(0)}, **options
    )
    return routing.combine_weights[0, 0, 0]

  return jax.grad(loss)(jnp.asarray([np.log(3), 0.0]))


@pytest.mark.parametrize('name', ['hard', 'gumbel'])
def test_one_expert_at_full_weight_has_the_softmax_s_gradient(name):
  np.testing.assert_array_equal(
    route(name, [[np.log(3), 0]]).combine_weights[0, 0], [1, 0]
  )
  # p = (3/4, 1/4): p_0 (1 - p_0) and -p_0 p_1.
  np.testing.assert_allclose(slope(name), [3 / 16, -3 / 16], rtol=1e-6)
  # At temperature 1/2, p = (9/10, 1/10), and 2 p_0 p_1.
  np.testing.assert_allclose(
    slope(name, temperature=0.5), [0.18, -0.18], rtol=1e-5
  )


def test_gumbel_draws_an_expert_with_its_probability_in_training():
  tokens = np.tile([np.log(3), 0], (4_000, 1))
  for temperature in (1.0, 0.5):
    weights = route(
      'gumbel',
      tokens,
      TRAIN,
      {'router': jax.random.key(1)},
      temperature=temperature,
    ).combine_weights[0]
    np.testing.assert_array_equal(jnp.sum(weights, -1), 1)
    # 3/4 whatever the temperature, which scales logits and noise. The standard
    # error is sqrt(3/16 / 4000) = 0.007; four of them.
    np.testing.assert_allclose(jnp.mean(weights[:, 0]), 0.75, atol=0.028)


def test_noisy_top_k_has_noise_of_softplus_0_at_first_in_training_only():
  x = jnp.ones((1, 4_000, 2))
  router = ROUTERS['noisy_topk'].module(experts=2, k=2)
  peft = {'kernel': jnp.zeros((2, 2)), 'noise_kernel': jnp.zeros((2, 2))}
  rngs = {'router': jax.random.key(0)}
  quiet = router.apply({'peft': peft}, x, Context())
  np.testing.assert_array_equal(quiet.combine_weights, 0.5)
  noisy = router.apply({'peft': peft}, x, TRAIN, rngs=rngs).combine_weights
  # The difference of two logits: standard deviation sqrt(2) softplus(0), which
  # is sqrt(2) ln 2; its own standard error is 1 / sqrt(8000) of it, 1.1 %.
  difference = jnp.log(noisy[0, :, 0] / noisy[0, :, 1])
  np.testing.assert_allclose(
    jnp.std(difference), np.sqrt(2) * np.log(2), rtol=0.045
  )


def test_low_rank_scores_lie_in_a_space_of_rank_dimensions():
  router = ROUTERS['low_rank'].module(experts=7, rank=2)
  x = jax.random.normal(jax.random.key(0), (1, 20, 11))
  routing, variables = router.init_with_output(jax.random.key(1), x, Context())
  assert np.linalg.matrix_rank(np.asarray(routing.logits[0]), 1e-5) == 2
  # 2 (11 + 7) parameters, not 11 * 7.
  assert sum(a.size for a in jax.tree.leaves(variables)) == 36


def test_sparsegen_at_zero_is_sparsemax_and_larger_is_sparser():
  z = jnp.array([1.0, 0.5, -1.0])
  # Two experts: t = (1.5 - 1) / 2.
  np.testing.assert_allclose(sparsegen(z, jnp.zeros(1)), [0.75, 0.25, 0])
  # 1 - l = 1/2: t = (1.5 - 0.5) / 2 = 1/2, the second expert just out.
  np.testing.assert_allclose(
    sparsegen(z, jnp.array([0.5])), [1, 0, 0], atol=1e-7
  )
  # 1 - l = 5: t = (0.5 - 5) / 3 = -1.5; (2.5, 2, 0.5) / 5.
  np.testing.assert_allclose(
    sparsegen(z, jnp.array([-4.0])), [0.5, 0.4, 0.1], rtol=1e-6
  )


def test_the_sparsity_bound_is_where_a_third_expert_goes():
  z = jnp.array([1.0, 0.5, -1.0])
  # 1 - (1.5 - 2 * -1) = -2.5.
  bound = lower_bound(z, 2)
  np.testing.assert_allclose(bound, -2.5)
  above, below = (sparsegen(z, bound[None] + d) for d in (0.01, -0.01))
  assert above[2] == 0 and below[2] > 0
  # A layer with two experts has no third.
  assert lower_bound(z[:2], 2) == lower_bound(z.at[2].set(-jnp.inf), 2)
  assert lower_bound(z[:2], 2) == -jnp.inf


def test_entropy_adaptive_takes_all_experts_where_a_token_is_unsure():
  tokens = [
    logs(0.02, 0.5, 0.28, 0.2),
    logs(0.01, 0.96, 0.02, 0.01),
    logs(0.05, 0.3, 0.3, 0.35),
  ]
  # With q = 2, (1 - sum p^2) / (1 - 1/4): sums of 0.3688, 0.9222 and 0.305, so
  # 0.84, 0.10 and 0.93; the threshold is 0.9.
  weights = route('entropy_adaptive', tokens, q=2.0).combine_weights[0]
  # 0.5 <= 0.75, 0.5 + 0.28 > 0.75, but two experts at least.
  np.testing.assert_allclose(weights[0], [0, 0.5, 0.28, 0], rtol=1e-5)
  np.testing.assert_allclose(weights[1], [0, 0.96, 0.02, 0], rtol=1e-5)
  np.testing.assert_allclose(weights[2], [0.05, 0.3, 0.3, 0.35], rtol=1e-5)
  # Three experts where their sum stays within p.
  weights = route(
    'entropy_adaptive', tokens[:1], p=0.99, q=2.0
  ).combine_weights[0]
  np.testing.assert_allclose(weights[0], [0, 0.5, 0.28, 0.2], rtol=1e-5)


def test_tsallis_entropy_is_that_of_the_experts_that_a_layer_has():
  # q = 2: (1 - 1/4 - 1/4) / (1 - 1/2) = 1, up to 1e-5 in each probability.
  p, has = jnp.array([0.5, 0.5, 0.0]), jnp.array([True, True, False])
  np.testing.assert_allclose(tsallis_entropy(p, 2.0, has), 1, atol=1e-4)
  # Of three: (1 - 1/2) / (1 - 1/3).
  every = jnp.ones(3, bool)
  np.testing.assert_allclose(tsallis_entropy(p, 2.0, every), 0.75, atol=1e-4)


def routing_of(*weights):
  weights = jnp.asarray(weights, jnp.float32)[None]
  return Routing(jnp.log(weights), weights)


def test_importance_is_the_squared_variation_of_the_sums():
  # Sums 1.5 and 0.5: variance 1/4 over mean 1.
  routing = routing_of([0.75, 0.25], [0.75, 0.25])
  np.testing.assert_allclose(loss_of(routing, 'importance'), 0.25, rtol=1e-6)
  # Expert 2, which the layer does not have, does not count.
  masked = Routing(
    jnp.pad(routing.logits, ((0, 0), (0, 0), (0, 1)), constant_values=-np.inf),
    jnp.pad(routing.combine_weights, ((0, 0), (0, 0), (0, 1))),
  )
  sums = router_stats(masked, None, jnp.array([True, True, False]))
  np.testing.assert_allclose(aux_losses.importance(sums), 0.25, rtol=1e-6)


def test_generalized_js_is_least_where_tokens_are_sure_and_differ():
  # Both the same: no divergence, all of 0.98 - 0.5 is left.
  same = routing_of([0.75, 0.25], [0.75, 0.25])
  np.testing.assert_allclose(loss_of(same, 'generalized_js'), 0.48, rtol=1e-5)
  # The mean is even, ln 2; each has ln 4 - 3/4 ln 3 = 0.562335 nats. The
  # divergence is 0.130812, and 0.48 - 0.130812 / ln 2 = 0.291278 is left.
  apart = routing_of([0.75, 0.25], [0.25, 0.75])
  np.testing.assert_allclose(
    loss_of(apart, 'generalized_js'), 0.291278, rtol=1e-5
  )
  sure = routing_of([0.99, 0.01], [0.01, 0.99])
  assert loss_of(sure, 'generalized_js') == 0


@pytest.mark.parametrize('name', ROUTERS)
def test_losses_of_a_layer_with_fewer_experts_have_finite_gradients(name):
  router = make(name, 4)
  mask = jnp.array([True, True, False, False])
  ctx = context(1, 3).replace(expert_mask=mask)
  x = jax.random.normal(jax.random.key(0), (1, 3, 8))
  rngs = {'peft': jax.random.key(1), 'router': jax.random.key(2)}
  variables = jax.jit(router.init)(rngs, x, ctx)
  names = [*aux_losses.LOSSES, *ROUTERS[name].losses]

  def loss(variables, x):
    sums = router_stats(
      router.apply(variables, x, ctx.replace(train=True), rngs=rngs),
      None,
      ctx.expert_mask,
    )
    return aux_losses.auxiliary_loss({'a': sums}, dict.fromkeys(names, 1.0))

  both = jax.jit(jax.value_and_grad(loss, (0, 1)))
  value, gradients = both(variables, x)
  assert np.isfinite(value)
  for gradient in jax.tree.leaves(gradients):
    assert np.isfinite(gradient).all()
