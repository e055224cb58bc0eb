# SPDX-License-Identifier: Apache-2.0
"""Losses of the experts' parameters alone, once a training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft.core.types import State
from moepeft.models.t5 import model as t5
from moepeft.moe import aux_losses
from moepeft.objectives import Objective
from moepeft.peft import build
from moepeft.training.step import make_train_step
from tests.contracts import small


def test_orthogonality_by_hand():
  # Columns of A: e_1 and e_2, 3 e_1, and e_3. The first two experts have the
  # product 3 in one of two places, no others have any: 9.
  a = jnp.zeros((3, 3, 2))
  a = a.at[0, 0, 0].set(1).at[1, 0, 1].set(1).at[0, 1, 0].set(3)
  a = a.at[2, 2, 0].set(1)
  np.testing.assert_allclose(aux_losses.orthogonality(a), 9)


def direct(stacks):
  """The mean over arrays and layers of [l, i, e, r], pair by pair."""
  means = []
  for stack in stacks:
    layers = [
      sum(
        np.sum((a[:, e].T @ a[:, f]) ** 2)
        for e in range(a.shape[1])
        for f in range(e)
      )
      for a in stack
    ]
    means.append(np.mean(layers))
  return np.mean(means)


METHOD = "molora(experts=3, rank=2, targets='*/self/o')"


def tree_of(seed=0):
  """Arrays of two stacks at o, which has heads, with a router."""
  rng = np.random.default_rng(seed)
  site = lambda layers: {  # noqa: E731
    'a': rng.normal(size=(layers, 3, 5, 3, 2)).astype(np.float32),
    'b': rng.normal(size=(layers, 3, 2, 11)).astype(np.float32),
    'router': {'kernel': np.ones((layers, 15, 3), np.float32)},
  }
  return {
    side: {'layers': {'self': {'o': {'molora': site(layers)}}}}
    for side, layers in (('encoder', 2), ('decoder', 3))
  }


def test_a_method_s_experts_are_found_and_averaged():
  tree = tree_of()
  built = build(METHOD, t5.sites(small.GATED))
  loss = aux_losses.parameter_loss(
    tree, built.down_arrays, {'orthogonality': 2.0, 'z': 5.0}
  )
  stacks = [tree[side]['layers']['self']['o']['molora']['a'] for side in tree]
  expected = direct([a.reshape(len(a), 15, 3, 2) for a in stacks])
  np.testing.assert_allclose(loss, 2 * expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('method', 'expected'),
  [
    (METHOD, ('/molora/a$',)),
    # One A for all has nothing to be orthogonal to.
    ('hydralora', ()),
    ('comol', ()),
    ('smear', ('/smear/down$',)),
    ('lora', ()),
  ],
)
def test_only_experts_with_projections_of_their_own_have_it(method, expected):
  assert build(method, t5.sites(small.GATED)).down_arrays == expected


def gradient(weights, accumulate):
  """The step of plain gradient descent from `tree_of`, and its router loss."""
  model, built = small.make(METHOD)

  def objective(apply, variables, rows, rngs):
    arrays = jax.tree.leaves(variables['peft'])
    total = sum(map(jnp.sum, arrays)) * jnp.sum(rows['x'])
    return total, {'weight': jnp.sum(rows['x']), 'routing': {}}

  optimizer = optax.sgd(1.0)
  step = make_train_step(
    model, built, Objective(objective), optimizer, weights, accumulate
  )
  peft = jax.tree.map(jnp.asarray, tree_of())
  state = State(
    step=jnp.int32(0),
    trainable=peft,
    frozen={},
    opt=optimizer.init(peft),
    rng=jax.random.key(0),
  )
  new, metrics = jax.jit(step)(state, {'x': jnp.arange(1.0, 5)})
  change = jax.tree.map(lambda a, b: a - b, peft, new.trainable)
  return change, metrics['router_loss']


def test_a_step_adds_its_gradient_once_with_accumulation_too():
  built = build(METHOD, t5.sites(small.GATED))
  weights = {'orthogonality': 0.01}
  loss, slope = jax.value_and_grad(aux_losses.parameter_loss)(
    jax.tree.map(jnp.asarray, tree_of()), built.down_arrays, weights
  )
  assert float(loss) > 0.01
  for parts in (1, 2):
    actual, router_loss = gradient(weights, parts)
    np.testing.assert_allclose(router_loss, loss, rtol=1e-6)
    # The objective's gradient is one everywhere; float32 sums of a few units.
    jax.tree.map(
      lambda a, s: np.testing.assert_allclose(a, 1 + s, atol=2e-6, rtol=1e-5),
      actual,
      slope,
    )
