# SPDX-License-Identifier: Apache-2.0
"""Routers and their losses equal the papers' equations in NumPy.

Axes: b 2, t 7; i 33 features, 3 for each of e 11 experts.
"""

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
  'arrow': (
    {'k': 3, 'temperature': 0.5},
    {'kernel': KERNEL},
    lambda x: equations.arrow(x, KERNEL, 3, 0.5),
  ),
}
ROUTER_OF = {'temperature': 'softmax'}


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
