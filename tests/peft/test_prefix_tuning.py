# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning: attention over trained keys and values, and experts of them;
P-tuning: a prompt that an MLP computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.checkpoints.adapter import AdapterWeights, folded
from moepeft.core.types import Context
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.attention import IMPLEMENTATIONS, Heads
from moepeft.peft import build

from ..contracts import small, small_decoders
from .test_semantics import adapter, normal, softmax

# float32 sums of tens of products.
CLOSE = dict(rtol=1e-5, atol=1e-5)
# Two rows of five queries and seven keys; six heads on two; three vectors.
B, T, S, N, K, H, R = 2, 5, 7, 6, 2, 4, 3
MASK = np.random.default_rng(3).random((B, 1, T, S)) > 0.3
BIAS = normal('bias', 1, N, T, S)
PREFIX = {'k': normal('pk', R, K, H), 'v': normal('pv', R, K, H)}


def heads():
  q, k, v = (
    normal(name, B, size, count, H)
    for name, size, count in (('q', T, N), ('k', S, K), ('v', S, K))
  )
  arrays = (jnp.asarray(a, jnp.float32) for a in (q, k, v, BIAS))
  return Heads(*arrays, MASK)


def core(implementation='naive'):
  return BaseLayer(functools.partial(IMPLEMENTATIONS[implementation], cap=0.0))


def apply(module, tree, implementation='naive', ctx=None):
  tree = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
  ctx = ctx or Context(token_mask=jnp.ones((B, T), bool))
  run = lambda tree: module.apply(  # noqa: E731
    {'peft': tree}, core(implementation), heads(), ctx
  )
  return np.asarray(jax.jit(run)(tree))


def attention(prefix, weights=None):
  """Equation 3 of Li and Liang in NumPy: attention over [P; tokens].

  Args:
    weights: [b, t, r], of the exponentials of the prefix's logits.
  """
  h = jax.tree.map(lambda a: np.asarray(a, np.float64), heads())
  keys, values = (
    np.concatenate([np.broadcast_to(p, (B, *p.shape)), a], axis=1)
    for p, a in ((prefix['k'], h.k), (prefix['v'], h.v))
  )
  keys, values = (np.repeat(a, N // K, axis=2) for a in (keys, values))
  logits = np.einsum('btnh,bsnh->bnts', h.q, keys)
  r = len(prefix['k'])
  logits[..., r:] = np.where(MASK, logits[..., r:] + BIAS, -np.inf)
  if weights is not None:
    with np.errstate(divide='ignore'):
      logits[..., :r] += np.log(weights)[:, None]
  return np.einsum('bnts,bsnh->btnh', softmax(logits), values)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_every_query_sees_the_prefix_without_mask_and_bias(implementation):
  module = adapter(f'prefix(length={R})', site='encoder/self/core')
  actual = apply(module, PREFIX, implementation)
  np.testing.assert_allclose(actual, attention(PREFIX), **CLOSE)


def test_dropout_is_of_keys_and_values_in_training_alone():
  method = f'prefix(length={R}, dropout=0.5)'
  module = adapter(method, site='encoder/self/core')
  np.testing.assert_allclose(apply(module, PREFIX), attention(PREFIX), **CLOSE)
  f = BaseLayer(lambda heads: jnp.stack([heads.k[:, :R], heads.v[:, :R]]))
  tree = jax.tree.map(jnp.asarray, PREFIX)
  rngs = {'dropout': jax.random.key(0)}
  ctx = Context(train=True)
  actual = module.apply({'peft': tree}, f, heads(), ctx, rngs=rngs)
  full = np.stack([PREFIX['k'], PREFIX['v']])[:, None].astype(np.float32)
  nonzero = np.asarray(actual) != 0
  assert 0.2 < nonzero.mean() < 0.8
  np.testing.assert_allclose(actual, np.where(nonzero, 2 * full, 0), rtol=1e-6)


def test_no_query_sees_a_vector_of_zeros():
  module = adapter(f'prefix(length={R + 2})', site='encoder/self/core')
  padded = {
    name: np.pad(a, ((0, 2), (0, 0), (0, 0))) for name, a in PREFIX.items()
  }
  np.testing.assert_allclose(apply(module, padded), attention(PREFIX), **CLOSE)


def test_a_routers_weights_multiply_the_attention_to_an_experts_keys():
  module = adapter(
    f'mixture(expert=prefix(length={R}), experts=2, router=topk(k=1))',
    site='encoder/self/core',
  )
  experts = {name: normal(name * 3, 2, R, K, H) for name in 'kv'}
  # One column is zero: p = 1 / (1 + exp(-q w)), and the larger one remains.
  kernel = np.stack([normal('w', N * H), np.zeros(N * H)], axis=1)
  q = np.asarray(heads().q).reshape(B, T, -1)
  p = softmax(q @ kernel)
  p = np.where(p == p.max(-1, keepdims=True), p, 0)
  assert 0 < (p[..., 0] > 0).sum() < B * T
  actual = apply(module, experts | {'router': {'kernel': kernel}})
  flat = {name: a.reshape(-1, K, H) for name, a in experts.items()}
  expected = attention(flat, np.repeat(p, R, axis=-1))
  np.testing.assert_allclose(actual, expected, **CLOSE)


def test_one_expert_is_the_prefix():
  module = adapter(
    f'mixture(expert=prefix(length={R}), experts=1)', site='encoder/self/core'
  )
  experts = {name: a[None] for name, a in PREFIX.items()}
  kernel = normal('w', N * H, 1)
  actual = apply(module, experts | {'router': {'kernel': kernel}})
  single = adapter(f'prefix(length={R})', site='encoder/self/core')
  np.testing.assert_allclose(actual, apply(single, PREFIX), **CLOSE)


def test_a_folded_prefix_has_the_keys_and_values_of_its_mlp():
  # tanh(E D + c) U + b by hand: E D = 2 and 0.5, c = -1, so the hidden unit is
  # tanh(1) and tanh(-0.5); U = 3, 5 and b = 1, 0 at the two features of k.
  arrays = {
    'embedding': [[2.0], [0.5]],
    'down': [[1.0]],
    'down_bias': [-1.0],
    'up_k': [[[3.0, 5.0]]],
    'bias_k': [[1.0, 0.0]],
    'up_v': [[[1.0, 0.0]]],
    'bias_v': [[0.0, 2.0]],
  }
  stacked = {name: np.array([a]) for name, a in arrays.items()}
  tree = {'decoder': {'layers': {'self': {'core': {'prefix': stacked}}}}}
  method = 'prefix(length=2, hidden=1)'
  actual = folded(AdapterWeights(method, tree))
  assert actual.method == 'prefix(length=2)'
  result = actual.tree['decoder']['layers']['self']['core']['prefix']
  unit = np.tanh([1.0, -0.5])
  np.testing.assert_allclose(
    result['k'][0, :, 0], np.stack([3 * unit + 1, 5 * unit], axis=1)
  )
  np.testing.assert_allclose(
    result['v'][0, :, 0], np.stack([unit, [2.0, 2.0]], axis=1)
  )


def test_a_folded_p_tuning_is_the_prompt_of_its_mlp():
  # relu(2 - 1) = 1 and relu(0.5 - 1) = 0; then relu(3 h); then 5 h + 7.
  arrays = {
    'embedding': [[2.0], [0.5]],
    'kernel_0': [[1.0]],
    'bias_0': [-1.0],
    'kernel_1': [[3.0]],
    'bias_1': [0.0],
    'kernel_2': [[5.0]],
    'bias_2': [7.0],
  }
  tree = {'embed': {'p_tuning': {n: np.array(a) for n, a in arrays.items()}}}
  actual = folded(AdapterWeights('p_tuning(length=2, hidden=1)', tree))
  assert actual.method == 'prompt(length=2)'
  vectors = actual.tree['embed']['prompt']['vectors']
  np.testing.assert_array_equal(vectors, [[22.0], [7.0]])


def test_what_has_nothing_to_fold_stays_as_it_is():
  tree = {'decoder': {'layers': {'self': {'q': {'lora': {'a': np.ones(2)}}}}}}
  actual = folded(AdapterWeights('lora(rank=2)', tree))
  assert actual.method == 'lora(rank=2)'
  jax.tree.map(np.testing.assert_array_equal, actual.tree, tree)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('method', 'kind'),
  [
    ('prefix(length=2, hidden=4)', 't5'),
    ('prefix(length=2, hidden=4)', 'llama'),
    ('p_tuning(length=2, hidden=4)', 't5'),
    ('p_tuning(length=2, hidden=4) + lora(rank=2)', 'llama'),
  ],
)
def test_a_folded_adapter_computes_the_same(method, kind):
  if kind == 't5':
    make, variables, batch = small.make, small.variables(method), small.batch()
  else:
    config = small_decoders.CONFIGS['llama']
    make = lambda method: small_decoders.make(config, method)  # noqa: E731
    variables, batch = make(method)[1], small_decoders.batch()
  # Placeholders, which an adapter at the embedding replaces.
  ids = batch['inputs'].at[:, :2].set(jnp.array([37, 38]))
  batch = batch | {'inputs': ids} if 'p_tuning' in method else batch
  adapter = folded(AdapterWeights(method, variables['peft']))
  assert 'hidden' not in adapter.method
  expected = small.jitted(make(method)[0])(variables, batch)
  actual = small.jitted(make(adapter.method)[0])(
    {'params': variables['params'], 'peft': adapter.tree}, batch
  )
  # Float32 through three layers.
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_each_of_several_texts_in_a_row_has_the_prefix():
  config = small_decoders.CONFIGS['mistral']
  model, variables = small_decoders.make(config, 'prefix(length=3)')
  ids = np.asarray(small_decoders.batch()['inputs'][:1])
  packed = {
    'inputs': ids,
    'inputs_segments': np.array([[1] * 6 + [2] * 5]),
    'inputs_positions': np.array([[*range(6), *range(5)]]),
  }
  actual = small.jitted(model)(variables, packed)
  for start, end in ((0, 6), (6, 11)):
    alone = small.jitted(model)(variables, {'inputs': ids[:, start:end]})
    np.testing.assert_allclose(
      actual[:, start:end], alone, rtol=1e-4, atol=1e-4
    )


def test_a_prefix_acts_at_attention_cores_only():
  model, _ = small.make("prefix(targets='*/q')")
  with pytest.raises(ValueError, match='prefix acts at the core of attentions'):
    jax.eval_shape(lambda: model.init(small.RNGS, small.batch()))


def test_experts_have_no_mlp():
  model, _ = small.make('mixture(expert=prefix(hidden=3), experts=2)')
  with pytest.raises(ValueError, match='have no MLP; leave out hidden'):
    jax.eval_shape(lambda: model.init(small.RNGS, small.batch()))


def test_a_t5_has_prefixes_at_all_its_attentions():
  sites = small.make('prefix')[1].adapter_map.entries
  assert [path for path, _ in sites] == [
    'encoder/self/core',
    'decoder/self/core',
    'decoder/cross/core',
  ]
  assert build('prefix', {'decoder/self/core': 'core'}).method == 'prefix'
