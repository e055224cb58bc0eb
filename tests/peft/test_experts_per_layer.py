# SPDX-License-Identifier: Apache-2.0
"""Mixtures whose layers have unlike counts of experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from moepeft import config as config_lib
from moepeft.checkpoints import adapter
from moepeft.checkpoints.count_parameters import count
from moepeft.core.types import Context, Routing
from moepeft.evaluation.tables import routing as routing_table
from moepeft.models import weight_mapping
from moepeft.models.t5 import model as t5
from moepeft.moe import ROUTERS, aux_losses
from moepeft.moe.router_stats import collect, router_stats, statistics
from moepeft.moe.routers.topk import TopK
from moepeft.nn import expert_padding
from moepeft.nn.initializers import padded_axes, param_metadata
from moepeft.peft.build import build
from moepeft.peft.method_text import canonical_text, expanded_text
from moepeft.runs import metrics_log, router_diagnosis
from moepeft.runs.history import History
from moepeft.training.metrics_logger import routing_rows
from moepeft.training.setup import build_train_step

from ..contracts import small
from ..training.test_update import make_state

SITES = t5.sites(small.GATED)
# The encoder of `small.GATED` has two layers, the decoder three.
MOLA = (
  'molora(experts_per_layer=[1, 4], rank=2, '
  "targets='encoder/self/q|encoder/mlp/wo') + "
  'mov(experts_per_layer=[3, 2, 4], router=topk(k=2), '
  "targets='decoder/self/k|decoder/cross/v|decoder/mlp/act')"
)
MASK = jnp.array([True, True, True, False, False])
X = jax.random.normal(jax.random.key(0), (2, 5, 7))


@pytest.mark.parametrize(
  'text',
  [
    'molora(experts_per_layer=[2, 4])',
    'molora(experts_per_layer=(2, 4), rank=2)',
    'mixture(expert=lora(rank=4), experts_per_layer=[2, 4], '
    'router=topk(k=2, renormalize=True))',
    MOLA,
  ],
)
def test_texts_round_trip(text):
  built = build(text, SITES)
  assert 'experts=' not in built.method
  assert build(built.method, SITES) == built
  assert build(canonical_text(text), SITES).adapter_map == built.adapter_map
  full = expanded_text(text)
  assert expanded_text(full) == full and ' experts=' not in full
  assert 'experts_per_layer' not in expanded_text('molora')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ('experts_per_layer=[2, 0]', 'a list of integers, each at least 1'),
    ('experts_per_layer=[2, 2.0]', 'a list of integers, each at least 1'),
    ('experts_per_layer=[]', 'a list of integers, each at least 1'),
    ('experts_per_layer=4', 'experts_per_layer is of type list; got 4'),
    (
      'experts_per_layer=[2, 4], experts=4',
      'one of experts and experts_per_layer; drop the others',
    ),
    (
      'experts_per_layer=[2, 4]',
      'for 2 layers, and decoder/.* is in a stack of 3; give a count for each',
    ),
    (
      "experts_per_layer=[2, 4], router=topk(k=3), targets='encoder/*/q'",
      'k=3 experts needs as many in each layer; experts_per_layer has 2',
    ),
    ("experts_per_layer=[2, 4], targets='head'", 'is in a stack of 0'),
  ],
)
def test_mistakes_have_one_sentence(options, message):
  with pytest.raises(ValueError, match=message) as error:
    model, _ = small.make(f'molora({options})')
    param_metadata(model, small.batch())
  assert '\n' not in str(error.value)


def run(router, expert_mask=None, kernel=None, train=False):
  """The routing of X, by a given kernel."""
  ctx = Context(expert_mask=expert_mask, train=train)
  rngs = {'peft': jax.random.key(1), 'router': jax.random.key(3)}
  if kernel is None:
    return router.init_with_output(rngs, X, ctx)[0]
  return router.apply({'peft': {'kernel': kernel}}, X, ctx, rngs=rngs)


@pytest.mark.parametrize('name', ['softmax', 'topk', 'uniform'])
def test_a_masked_router_and_its_sums_are_those_of_fewer_experts(name):
  options = {'k': 2} if name == 'topk' else {}
  kernel = jax.random.normal(jax.random.key(5), (7, 5))
  module = ROUTERS[name].module

  @functools.partial(jax.jit, static_argnums=0)
  def routed(router, mask, kernel):
    routing = run(router, mask, kernel)
    sums = router_stats(routing, None, mask)
    losses = [loss(sums) for loss in aux_losses.LOSSES.values()]
    return routing.combine_weights, sums.experts, losses, sums

  weights, experts, losses, sums = routed(
    module(experts=5, **options), MASK, kernel
  )
  fewer_weights, fewer, fewer_losses, fewer_sums = routed(
    module(experts=3, **options), None, kernel[:, :3]
  )
  actual, expected = statistics(sums), statistics(fewer_sums)
  np.testing.assert_array_equal(weights[..., 3:], 0)
  np.testing.assert_allclose(weights[..., :3], fewer_weights, rtol=1e-6)
  assert float(experts) == float(fewer) == 3
  # The variation of even weights is zero but for rounding.
  np.testing.assert_allclose(losses, fewer_losses, rtol=1e-6, atol=1e-12)
  np.testing.assert_allclose(actual.share[:3], expected.share, rtol=1e-6)
  for key in ('entropy', 'weight_entropy', 'variation', 'top'):
    # Of the share of a uniform router, the deviation is float32 rounding.
    np.testing.assert_allclose(
      getattr(actual, key), getattr(expected, key), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
  'router',
  [
    ROUTERS['softmax'].module(5, jitter=0.3, dropout=0.7),
    TopK(5, k=3, jitter=0.3, dropout=0.7),
    TopK(5, k=3, renormalize=True),
    ROUTERS['random'].module(5, k=3),
    ROUTERS['uniform'].module(5),
  ],
  ids=str,
)
def test_gradients_with_noise_and_losses_are_finite_and_none_of_absent_experts(
  router,
):
  def loss(kernel):
    routing = run(router, MASK, kernel, train=True)
    sums = router_stats(routing, None, MASK)
    losses = sum(f(sums) for f in aux_losses.LOSSES.values())
    return losses + jnp.sum(routing.combine_weights**2), routing

  kernel = jax.random.normal(jax.random.key(5), (7, 5))
  slope, routing = jax.jit(jax.grad(loss, has_aux=True))(kernel)
  assert np.isfinite(slope).all()
  np.testing.assert_array_equal(slope[:, 3:], 0)
  weights = np.asarray(routing.combine_weights)
  np.testing.assert_array_equal(weights[..., 3:], 0)
  assert (weights.sum(-1) > 0.1).all()


# Of an adapter at one site, with its gradients and an optimizer:
# tests/training/test_expert_padding.py.
@pytest.mark.slow
@pytest.mark.parametrize('remat', ['full', 'none'])
def test_scanned_layers_equal_layers_one_by_one(remat):
  variables = small.variables(MOLA, noise=0.3)

  def loss(peft, model, unstack):
    peft = unstack(peft)
    params = unstack(variables['params'])
    logits, changed = model.apply(
      {'params': params, 'peft': peft}, small.batch(), mutable=['routing']
    )
    sums = collect(changed['routing']).values()
    balance = [jnp.atleast_1d(aux_losses.load_balance(s)) for s in sums]
    return jnp.mean(logits**2), jnp.sum(jnp.concatenate(balance))

  def gradient(model, unstack=lambda tree: tree):
    grad = jax.grad(loss, has_aux=True)
    return jax.jit(lambda peft: grad(peft, model, unstack)[0])

  scanned, _ = small.make(MOLA, remat=remat)
  looped, _ = small.make(MOLA, scan=False)
  peft = variables['peft']
  slopes = gradient(scanned)(peft)
  jax.tree.map(
    # Float32 sums in another order.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    slopes,
    gradient(looped, small.unstack)(peft),
  )
  check_padding_has_no_gradient(slopes, padded_axes(scanned, small.batch()))


def check_padding_has_no_gradient(slopes, padded):
  for path, slope in weight_mapping.flatten(slopes).items():
    array = np.array(slope)
    assert np.abs(array).max() > 0
    padded[path].clear_padding(array)
    np.testing.assert_array_equal(array, slope)


def test_the_mask_is_that_of_the_layer():
  model, _ = small.make(MOLA)
  variables = small.variables(MOLA, noise=0.3)

  @jax.jit
  def collected(variables, batch):
    _, changed = model.apply(variables, batch, mutable=['routing', 'weights'])
    return collect(changed['routing']), changed

  sites, changed = collected(variables, small.batch())
  actual = {site: np.asarray(sums.experts) for site, sums in sites.items()}
  encoder = actual['encoder/layers/self/q/molora']
  np.testing.assert_array_equal(encoder, [1, 4])
  decoder = actual['decoder/layers/cross/v/mov']
  np.testing.assert_array_equal(decoder, [3, 2, 4])
  weights = changed['weights']['decoder']['layers']['mlp']['act']['mov']
  used = (np.asarray(weights['weights'][0]) > 0).any(axis=(1, 2))
  np.testing.assert_array_equal(used.sum(-1), [3, 2, 4])
  rows = routing_rows(changed['routing'])
  row = rows['encoder/layers/self/q/molora']
  assert row['experts'] == [1, 4] and row['variation'][0] == 0
  (row,) = routing_rows(
    {'q': {'sums': router_stats(run(TopK(3)), None)}}
  ).values()
  assert 'experts' not in row


def test_logs_plots_alarms_and_tables_take_the_layers_own_experts():
  # Layers of 1, 2 and 4 experts; the second is even.
  site = {
    'weight': [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.97, 0.01, 0.01, 0.01]],
    'weight_entropy': [0.0, np.log(2), 0.2],
    'entropy': [0.0, np.log(2), 0.2],
    'experts': [1.0, 2.0, 4.0],
  }
  assert metrics_log.shares(site) == (
    'weight',
    [[1], [0.5, 0.5], [0.97, 0.01, 0.01, 0.01]],
  )
  alarms = router_diagnosis.collapsed_routers({'encoder/q': site}, 0.4)
  assert [*alarms] == ['encoder/q, layer 2']
  assert 'ln 4' in alarms['encoder/q, layer 2']
  (state,) = History([{'step': 1, 'routing': {'encoder/q': site}}]).routing()
  np.testing.assert_allclose(
    state.entropies['encoder/q'], [np.nan, 1, 0.2 / np.log(4)]
  )
  np.testing.assert_array_equal(
    np.isnan(state.shares['weight']['encoder/q']).sum(-1), [3, 2, 0]
  )
  kind, shares = metrics_log.share_array(site)
  summary = routing_table.summary({'q': (kind, shares, site['entropy'])})
  np.testing.assert_allclose(summary.entropy, (1 + 0.2 / np.log(4)) / 2)
  np.testing.assert_allclose(
    summary.max_shares['weight'], [(0.5 + 0.97) / 2, 0.97]
  )


def test_a_site_without_a_real_token_has_zeros():
  @jax.jit
  def of_padding(mask):
    logits = jnp.where(mask, jnp.zeros((1, 2, 5)), -jnp.inf)
    routing = Routing(logits, jax.nn.softmax(logits))
    sums = router_stats(routing, jnp.zeros((1, 2), bool), mask)
    return sums, aux_losses.load_balance(sums)

  sums, balance = of_padding(MASK)
  values = statistics(sums)
  assert float(values.variation) == float(values.top) == float(balance) == 0


def card():
  return adapter.describe(MOLA, 'official', 'base', '0' * 64, 't5', small.GATED)


def test_padding_starts_at_zero_and_is_not_exported(tmp_path):
  model, _ = small.make(MOLA)
  padded = padded_axes(model, small.batch())
  peft = weight_mapping.flatten(small.variables(MOLA)['peft'])
  counts = {'encoder': [1, 4], 'decoder': [3, 2, 4]}
  # A, router kernels and scales; B is zero at first.
  assert padded.keys() == peft.keys()
  for path, array in peft.items():
    axis = padded[path]
    assert [*axis.counts] == counts[path.split('/')[0]]
    experts = np.moveaxis(array, axis.axis, 1)
    for layer, size in zip(experts, axis.counts, strict=True):
      np.testing.assert_array_equal(layer[size:], 0)
      assert path.endswith('/b') or np.abs(layer[:size]).min() > 0

  tree = weight_mapping.unflatten(
    {path: array + (array != 0) for path, array in peft.items()}
  )
  adapter.save(tmp_path / 'adapter', tree, card())
  stored = load_file(tmp_path / 'adapter' / adapter.ARRAYS)
  assert {
    path: array.shape
    for path, array in stored.items()
    if path.startswith('encoder/layers_0/self/q') or path.endswith('_2/self/k')
  } == {
    'encoder/layers_0/self/q/molora/a': (11, 1, 2),
    'encoder/layers_0/self/q/molora/b': (1, 2, 3, 5),
    'encoder/layers_0/self/q/molora/router/kernel': (11, 1),
  }
  assert stored['decoder/layers_2/self/k/mov/scale'].shape == (4, 3, 5)
  loaded, read = adapter.load(tmp_path / 'adapter')
  jax.tree.map(np.testing.assert_array_equal, loaded, tree)
  total = sum(array.size for array in stored.values())
  assert read['parameters'] == total
  assert total == sum(
    axis.size(peft[path].shape) for path, axis in padded.items()
  )


def test_layers_that_do_not_fit_together_are_refused():
  for arrays in (
    {'layers_0/a': np.ones((2, 3)), 'layers_2/a': np.ones((2, 3))},
    {'layers_0/a': np.ones((2, 3)), 'layers_1/a': np.ones((3, 2))},
  ):
    with pytest.raises(ValueError, match='layers/a: expected an array of each'):
      expert_padding.stack_layers(arrays)


def test_counts_are_of_true_parameters():
  config = config_lib.default()
  config.model.path, config.model.family = '', 't5'
  config.model.size = 'small'
  config.method = (
    "molora(experts_per_layer=[1, 2, 3, 4, 5, 6, 7, 8], targets='*/self/q')"
  )
  actual = count(config)
  # Rank 4, 512 in and 384 out; the router's kernel.
  expert = 4 * (512 + 384) + 512
  assert actual['peft'] == 2 * 36 * expert
  assert actual['padding'] == 2 * 28 * expert
  assert actual['by_site']['encoder/self/q'] == 36 * expert
  assert actual['megabytes']['peft'] == round(2 * 64 * expert * 4 / 1e6, 3)


# In the fast suite parts are tests/contracts/test_router_kinds.py's, and the
# gradient of padding is that of the scanned layers above.
@pytest.mark.slow
def test_a_step_in_parts_equals_that_of_the_whole_batch():
  config = config_lib.default()
  config.batch_size = len(small.batch()['inputs'])
  config.router_losses.update(load_balance=0.1, entropy=-0.1)
  model, built = small.make(MOLA)
  before = small.variables(MOLA, noise=0.3)
  optimizer, after = optax.sgd(1.0), {}
  for parts in (1, 3):
    config.gradient_accumulation_steps = parts
    step = jax.jit(build_train_step(config, model, built, optimizer))
    state, _ = step(make_state(before, optimizer), small.batch())
    after[parts] = weight_mapping.flatten(state.trainable)
  first = weight_mapping.flatten(before['peft'])
  for path in first:
    # Float32 sums in another order.
    np.testing.assert_allclose(
      after[3][path], after[1][path], rtol=1e-4, atol=1e-6, err_msg=path
    )
  # The noise in the padding has no gradient.
  moved = {path: after[3][path] - array for path, array in first.items()}
  check_padding_has_no_gradient(moved, padded_axes(model, small.batch()))
