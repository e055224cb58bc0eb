# SPDX-License-Identifier: Apache-2.0
"""Sparse mixtures equal those that compute all experts."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context
from moepeft.moe.dispatch import block_size, dispatch
from tests.contracts import small
from tests.peft.test_semantics import adapter, projection


def weights(n, e, k):
  """k experts of each token with weights, the last expert with none."""
  rng = np.random.default_rng(0)
  array = np.zeros((n, e), np.float32)
  for row in array:
    row[rng.choice(e - 1, k, replace=False)] = rng.uniform(0.1, 1, k)
  return array


def test_each_token_is_in_a_slot_of_each_of_its_experts():
  # Tokens 0 to 2 have experts {2}, {0}, {2} of three. Blocks have 8 slots, the
  # smallest size: expert 0 has slots 0 to 7, expert 1 none, expert 2 8 to 15.
  array = jnp.array([[0, 0, 0.5], [0.25, 0, 0], [0, 0, 1.0]])
  slots = dispatch(array, 1)
  assert block_size(3, 3, 1) == 8
  np.testing.assert_array_equal(slots.slot[:, 0], [8, 0, 9])
  np.testing.assert_array_equal(slots.expert[:2], [0, 2])
  expected = np.zeros(24)
  expected[[8, 0, 9]] = [0.5, 0.25, 1]
  np.testing.assert_array_equal(slots.weights, expected)


def test_grouped_products_equal_ragged_dot():
  n, e, k, i, o = 37, 5, 2, 7, 3
  array, rng = weights(n, e, k), np.random.default_rng(1)
  x = rng.normal(size=(n, i)).astype(np.float32)
  kernels = rng.normal(size=(e, i, o)).astype(np.float32)

  @jax.jit
  def mixed(array, x, kernels):
    slots = dispatch(array, k)
    y = slots.matmul(slots.to_slots(x), kernels)
    return slots.from_slots(y * slots.weights[:, None])

  tokens, experts = np.nonzero(array)
  order = np.argsort(experts, kind='stable')
  tokens, experts = tokens[order], experts[order]
  y = jax.lax.ragged_dot(
    jnp.asarray(x[tokens]),
    jnp.asarray(kernels),
    jnp.asarray(np.bincount(experts, minlength=e)),
  )
  expected = np.zeros((n, o))
  np.add.at(expected, tokens, y * array[tokens, experts][:, None])
  # Sums of 14 float32 products of order one.
  np.testing.assert_allclose(
    mixed(array, x, kernels), expected, rtol=1e-5, atol=1e-5
  )


def assert_close(actual, expected):
  """float32 sums in another order, over the depth of a model."""
  actual, expected = (
    flax.traverse_util.flatten_dict(tree, sep='/')
    for tree in (actual, expected)
  )
  assert actual.keys() == expected.keys()
  for path, array in expected.items():
    largest = float(jnp.abs(array).max())
    assert largest > 0, path
    np.testing.assert_allclose(
      actual[path], array, atol=1e-5 * largest, err_msg=path
    )


@pytest.mark.parametrize(
  'options',
  [
    '',
    pytest.param(
      ', shared_experts=1, identity_experts=2', marks=pytest.mark.slow
    ),
    pytest.param(", init_weights='svd_chunks'", marks=pytest.mark.slow),
  ],
)
def test_sparse_low_rank_experts_equal_dense_ones(options):
  f, x, _, _, _ = projection('q')
  x = jnp.asarray(x, jnp.float32)
  outcomes = {}
  for form in ('dense', 'sparse'):
    text = f'mixture(expert=lora(rank=2), experts=5, router=topk(k=2){options}'
    module = adapter(f"{text}, dispatch='{form}')")
    init = jax.jit(lambda key, module=module: module.init(key, f, x, Context()))
    tree = init(jax.random.key(0))['peft']
    tree = small.moved(tree, 0.3, seed=1)

    def loss(tree, x, module=module):
      y = module.apply({'peft': tree}, f, x, Context())
      return jnp.sum(y**2), y

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    # Sorting is in the one program alone.
    assert ('sort[' in str(jax.make_jaxpr(loss)(tree, x))) == (form == 'sparse')
    (of_tree, of_x), y = gradient(tree, x)
    outcomes[form] = {'tree': of_tree, 'x': of_x, 'y': y}
  assert_close(outcomes['sparse'], outcomes['dense'])


def test_what_cannot_be_sorted_by_expert_is_refused():
  f, x, _, _, _ = projection('q')
  x = jnp.asarray(x, jnp.float32)
  for options in ('', ", router=topk(k=2), share='a'"):
    module = adapter(f"molora(experts=3{options}, dispatch='sparse')")
    with pytest.raises(ValueError, match="write dispatch='dense'"):
      module.init(jax.random.key(0), f, x, Context())
  with pytest.raises(ValueError, match='has no option'):
    adapter("mov(experts=3, dispatch='sparse')")


@pytest.mark.slow
def test_sparse_feed_forwards_equal_dense_ones():
  batch = small.batch()
  outcomes = {}
  for form in ('dense', 'sparse'):
    text = f"mixlora(experts=5, rank=2, dispatch='{form}')"
    model, _ = small.make(text)
    variables = small.variables(text, noise=0.3)

    def loss(peft, variables=variables, model=model):
      logits = model.apply({**variables, 'peft': peft}, batch)
      return jnp.sum(
        jnp.where(batch['targets_mask'][..., None], logits, 0) ** 2
      )

    gradient = jax.jit(jax.grad(loss))
    outcomes[form] = gradient(variables['peft'])
  assert_close(outcomes['sparse'], outcomes['dense'])
