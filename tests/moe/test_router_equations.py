# SPDX-License-Identifier: Apache-2.0
"""Routers and their losses equal the papers' equations in NumPy.

Axes: b 2, t 7; i 33 features, 3 for each of e 11 experts.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context
from moepeft.moe import ROUTERS, aux_losses
from moepeft.moe.router_stats import router_stats
from tests.reference import router_equations as equations

E, INPUTS = 11, 33
X = np.random.default_rng(0).standard_normal((2, 7, INPUTS))
MASK = np.arange(7)[None] < np.array([[7], [4]])


def normal(name, *shape):
  return np.random.default_rng(list(name.encode())).standard_normal(shape)


KERNEL = normal('kernel', INPUTS, E)
W, BIAS, D = normal('w', INPUTS), normal('bias'), normal('d', E)


U, V = normal('u', INPUTS, 5), normal('v', 5, E)
FIRST, SECOND = normal('first', INPUTS, 4), normal('second', INPUTS, 3)
MLP = {
  'hidden_kernel': normal('hidden kernel', INPUTS, 5),
  'hidden_bias': normal('hidden bias', 5),
  'output_kernel': normal('output kernel', 5),
  'output_bias': normal('output bias'),
}
SWIGLU = {
  'gate_kernel': normal('gate', INPUTS, 2 * E),
  'up_kernel': normal('up', INPUTS, 2 * E),
  'kernel': normal('output', 2 * E, E),
}


def sparsity(x):
  return equations.sparsity(
    x,
    MLP['hidden_kernel'],
    MLP['hidden_bias'],
    MLP['output_kernel'],
    MLP['output_bias'],
  )


def per_expert(x):
  """FlyLoRA's experts of rank one; of larger ones, their sums."""
  return x.reshape(E, -1).sum(-1)


# Router, options, parameters, (x of a token) -> weights.
CASES = {
  'softmax': ({}, {'kernel': KERNEL}, lambda x: equations.soft(x, KERNEL)),
  'temperature': (
    {'temperature': 2.5},
    {'kernel': KERNEL},
    lambda x: equations.soft(x, KERNEL / 2.5),
  ),
  'biased': (
    {'temperature': 2.5, 'bias': True},
    {'kernel': KERNEL, 'bias': D},
    lambda x: equations.softmax((x @ KERNEL + D) / 2.5),
  ),
  'flat': (
    {'temperature': 20.0},
    {'kernel': KERNEL},
    lambda x: equations.soft(x, KERNEL / 20),
  ),
  'topk': (
    {'k': 3, 'renormalize': True},
    {'kernel': KERNEL},
    lambda x: equations.top_k(x, KERNEL, 3, True),
  ),
  'threshold': (
    {},
    {'kernel': KERNEL, 'threshold_kernel': W, 'threshold_bias': BIAS},
    lambda x: equations.threshold(x, KERNEL, W, BIAS),
  ),
  'magnitude': (
    {'k': 4},
    {'state_bias': D},
    lambda x: equations.magnitude(per_expert(x), D, 4),
  ),
  'top_p': (
    {},
    {'kernel': KERNEL},
    lambda x: equations.top_p(x, KERNEL, 0.8, False),
  ),
  'top_p_renormalized': (
    {'p': 0.95, 'renormalize': True},
    {'kernel': KERNEL},
    lambda x: equations.top_p(x, KERNEL, 0.95, True),
  ),
  'sigmoid': ({}, {'kernel': KERNEL}, lambda x: equations.sigmoid(x @ KERNEL)),
  'sigmoid_hidden': (
    {'hidden': 2},
    SWIGLU,
    lambda x: equations.sigmoid(equations.swiglu(x, **SWIGLU)),
  ),
  # The gates of the tokens are on both sides.
  'sigmoid_threshold': (
    {'max_threshold': 0.9},
    {'kernel': KERNEL, 'threshold_kernel': W, 'threshold_bias': BIAS},
    lambda x: equations.thresholded_sigmoid(x @ KERNEL, x, W, BIAS, 0.9),
  ),
  'relu': ({}, {'kernel': KERNEL}, lambda x: equations.relu(x, KERNEL)),
  'hard': ({}, {'kernel': KERNEL}, lambda x: equations.hard(x @ KERNEL)),
  'gumbel': ({}, {'kernel': KERNEL}, lambda x: equations.hard(x @ KERNEL)),
  'noisy_topk': (
    {'k': 3},
    {'kernel': KERNEL, 'noise_kernel': KERNEL},
    lambda x: equations.top_k(x, KERNEL, 3, True),
  ),
  'low_rank': (
    {'rank': 5},
    {'kernel': U, 'up_kernel': V},
    lambda x: equations.soft(x, U @ V),
  ),
  # 4 x 3 sums, of which 11 are experts.
  'product_key': (
    {'k': 3},
    {'kernel': FIRST, 'second_kernel': SECOND},
    lambda x: equations.product_key(x, FIRST, SECOND, E, 3),
  ),
  'sparsegen': (
    {'hidden': 5, 'temperature': 4.0},
    MLP | {'kernel': KERNEL},
    lambda x: equations.sparsegen(x @ KERNEL / 4, sparsity(x)),
  ),
  'entropy_adaptive': (
    # The tokens' entropies are on both sides.
    {'entropy_threshold': 0.4},
    {'kernel': KERNEL},
    lambda x: equations.entropy_adaptive(x @ KERNEL, 0.75, 2, 0.4, 1.1),
  ),
  'phatgoose': (
    {'k': 3},
    {'kernel': KERNEL},
    lambda x: equations.phatgoose(x, KERNEL, 3),
  ),
  'arrow': (
    {'k': 3, 'temperature': 0.5},
    {'kernel': KERNEL},
    lambda x: equations.arrow(x, KERNEL, 3, 0.5),
  ),
}
ROUTER_OF = {
  'temperature': 'softmax',
  'biased': 'softmax',
  'flat': 'softmax',
  'sigmoid_hidden': 'sigmoid',
  'sigmoid_threshold': 'sigmoid',
  'top_p_renormalized': 'top_p',
}


def run(name):
  options, parameters, _ = CASES[name]
  router = ROUTERS[ROUTER_OF.get(name, name)].module(experts=E, **options)
  tree = {k: jnp.asarray(a, jnp.float32) for k, a in parameters.items()}
  x = jnp.asarray(X, jnp.float32)
  return jax.jit(lambda tree: router.apply({'peft': tree}, x, Context()))(tree)


@pytest.mark.parametrize('name', CASES)
def test_weights_equal_the_equation(name):
  actual = run(name).combine_weights
  for row, tokens in enumerate(X):
    for place, x in enumerate(tokens):
      # float32 logits of 33 products.
      np.testing.assert_allclose(
        actual[row, place], CASES[name][2](x), rtol=1e-4, atol=1e-6
      )


def real_tokens():
  return [x for row, keep in zip(X, MASK, strict=True) for x in row[keep]]


def loss(router, name):
  sums = router_stats(run(router), jnp.asarray(MASK))
  return aux_losses.auxiliary_loss({'a': sums}, {name: 1.0})


@pytest.mark.parametrize(('router', 'k'), [('softmax', 1), ('topk', 3)])
def test_load_balance_equals_switch_transformers(router, k):
  tokens = [equations.soft(x, KERNEL) for x in real_tokens()]
  np.testing.assert_allclose(
    loss(router, 'load_balance'), equations.load_balance(tokens, k), rtol=1e-5
  )


def test_threshold_balance_equals_the_released_code():
  tokens = [
    (equations.soft(x, KERNEL), 1 / E / (1 + np.exp(-(x @ W + BIAS))))
    for x in real_tokens()
  ]
  expected = equations.threshold_balance(tokens)
  of_probabilities = equations.load_balance([p for p, _ in tokens], 1)
  assert abs(expected - of_probabilities) > 0.1
  np.testing.assert_allclose(
    loss('threshold', 'threshold_balance'), expected, rtol=1e-4
  )


# Losses of a router alone, of all its tokens in NumPy.
OWN_LOSSES = {
  ('relu', 'relu_l1'): lambda tokens: equations.l1(
    [equations.relu(x, KERNEL) for x in tokens]
  ),
  ('sparsegen', 'sparsegen_balance'): lambda tokens: (
    equations.sparsegen_balance([CASES['sparsegen'][2](x) for x in tokens])
  ),
  ('sparsegen', 'sparsegen_gap'): lambda tokens: equations.sparsegen_gap(
    [(x @ KERNEL / 4, sparsity(x)) for x in tokens], 2
  ),
  ('sparsegen', 'sparsegen_slack'): lambda tokens: np.mean(
    [1 - sparsity(x) for x in tokens]
  ),
  ('entropy_adaptive', 'tsallis_entropy'): lambda tokens: np.mean(
    [equations.tsallis(equations.soft(x, KERNEL), 1.1) for x in tokens]
  ),
  ('entropy_adaptive', 'adaptive_balance'): lambda tokens: (
    equations.adaptive_balance(
      [
        (CASES['entropy_adaptive'][2](x), equations.soft(x, KERNEL))
        for x in tokens
      ]
    )
  ),
  ('topk', 'importance'): lambda tokens: equations.importance(
    [equations.top_k(x, KERNEL, 3, True) for x in tokens]
  ),
  ('flat', 'generalized_js'): lambda tokens: equations.generalized_js(
    [equations.soft(x, KERNEL / 20) for x in tokens], 0.98, 0.5
  ),
}


@pytest.mark.parametrize(('router', 'name'), OWN_LOSSES)
def test_losses_equal_their_equations(router, name):
  expected = OWN_LOSSES[router, name](real_tokens())
  assert expected > 0.01
  # float32 logits of 33 products.
  np.testing.assert_allclose(loss(router, name), expected, rtol=1e-4)


def test_noisy_top_k_in_training_equals_the_equations():
  x = jnp.asarray(X, jnp.float32)
  tree = {'kernel': KERNEL, 'noise_kernel': KERNEL / 9}
  tree = {k: jnp.asarray(a, jnp.float32) for k, a in tree.items()}
  router = ROUTERS['noisy_topk'].module(experts=E, k=3)
  rngs = {'router': jax.random.key(5)}
  actual = router.apply({'peft': tree}, x, Context(train=True), rngs=rngs)
  noise = jax.random.normal(
    nn.apply(lambda m: m.make_rng('router'), router)({}, rngs=rngs),
    (2, 7, E),
  )
  for row, place in np.ndindex(2, 7):
    token = X[row, place]
    expected = equations.noisy_top_k(
      token, KERNEL, KERNEL / 9, np.float64(noise[row, place]), 3
    )
    np.testing.assert_allclose(
      actual.combine_weights[row, place], expected, rtol=1e-4, atol=1e-6
    )
