# SPDX-License-Identifier: Apache-2.0
"""What makes each preset the published method that it is named after."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context
from moepeft.models import weight_mapping
from moepeft.models.decoder import model as decoder
from moepeft.models.t5 import model as t5
from moepeft.moe import ROUTERS, router_state
from moepeft.moe.router_stats import router_stats
from moepeft.moe.routers import arrow, magnitude
from moepeft.moe.routers.localized import localized_balance
from moepeft.nn.adapter_hook import BaseLayer, SublayerHook
from moepeft.nn.initializers import param_metadata
from moepeft.nn.mlp import Mlp
from moepeft.peft import METHODS, build
from moepeft.peft.build import routers
from moepeft.peft.method_text import canonical_text
from moepeft.peft.mixture import layer_counts

from ..contracts import small, small_decoders
from ..reference import router_equations_context as equations
from .test_semantics import CLOSE, adapter, call, normal, projection, softmax

SITES = t5.sites(small.GATED)
# Of presets that need a decoder-only model.
DECODER_SITES = {'xlora': decoder.sites(small_decoders.CONFIGS['llama'])}
PRESETS = [name for name, entry in METHODS.items() if entry.expert]


def shapes(method):
  """{path below a site and adapter: shape} of all sites, layers apart."""
  model, _ = small.make(method)
  return {
    path: shape
    for path, (shape, _) in param_metadata(model, small.batch()).items()
  }


@pytest.mark.parametrize('preset', PRESETS)
def test_a_preset_is_its_text_and_options_replace_its_values(preset):
  assert canonical_text(preset) == preset
  sites = DECODER_SITES.get(preset, SITES)
  built = build(preset, sites)
  assert build(built.method, sites) == built
  option = METHODS[preset].expert.size_option
  if option:
    other = f'{preset}({option}=7)'
    assert canonical_text(other) == other
    (module,) = {a for _, a in build(other, sites).adapter_map.entries}
    assert getattr(module.expert, option) == 7
  (router,) = routers(f'{preset}(router=uniform)').values()
  assert type(router) is ROUTERS['uniform'].module


# alpha / r, the first figure on which comparisons of papers depend.
@pytest.mark.parametrize(
  ('preset', 'scale'),
  [
    ('molora', 16 / 4),
    ('mixlora', 32 / 16),
    ('mola', 16 / 8),
    ('hydralora', 32 / 4),
    ('adamole', 16 / 4),
    ('flylora', 2 / 1),
    ('comol', 16 / 16),
    ('dynmole', 16 / 8),
    ('ldmole', 16 / 8),
    ('loramoe', 32 / 4),
    ('moelora', 32 / 16),
    ('poly', 1 / 8),
    ('mhr', 1 / 8),
    ('goat', 16 / 1),
    ('phatgoose', 1 / 16),
    ('hardrouted', 256 / 128),
    ('hmora', 8 / 8),
    ('lily', 16 / 16),
    ('mode', 16 / 4),
    ('moa', 8 / 8),
  ],
)
def test_the_scale_is_the_paper_s(preset, scale):
  expert = build(preset, SITES).adapter_map.entries[0][1].expert
  # Of several kinds of experts, those at the first site.
  expert = expert.at_site[0].expert if hasattr(expert, 'at_site') else expert
  assert expert.alpha / expert.rank == scale


def test_mixlora_is_a_mixture_of_feed_forwards_that_share_the_frozen_one():
  # d 11, f 17, gated with gelu; 3 experts of rank 2, scale 5 / 2.
  method = 'mixlora(experts=3, rank=2, alpha=5.0)'
  model, _ = small.make(method)
  params = small.params()['encoder']['layers']['mlp']
  kernels = {
    k: np.asarray(params[k]['kernel'][0]) for k in ('wi_0', 'wi_1', 'wo')
  }
  x = normal('x', 2, 7, 11)
  tree = {
    'gate_a': normal('ga', 11, 3, 2),
    'gate_b': normal('gb', 3, 2, 17),
    'up_a': normal('ua', 11, 3, 2),
    'up_b': normal('ub', 3, 2, 17),
    'down_a': normal('da', 17, 3, 2),
    'down_b': normal('db', 3, 2, 11),
    'router': {'kernel': normal('kernel', 11, 3)},
  }
  p = softmax(x @ tree['router']['kernel'])
  p = np.where(p > p.min(-1, keepdims=True), p, 0)
  p /= p.sum(-1, keepdims=True)
  expected = 0
  for e in range(3):

    def projected(y, kernel, name, e=e):
      a, b = tree[f'{name}_a'][:, e], tree[f'{name}_b'][e]
      return y @ kernels[kernel] + 5 / 2 * (y @ a) @ b

    gate = np.asarray(jax.nn.gelu(projected(x, 'wi_0', 'gate')))
    hidden = gate * projected(x, 'wi_1', 'up')
    expected += p[..., e : e + 1] * projected(hidden, 'wo', 'down')
  actual = feed_forward(model, params, tree, x)
  np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-3)


def feed_forward(model, params, tree, x):
  """The first layer's feed-forward of a T5 with the adapter around it."""

  class Sublayer(nn.Module):
    @nn.compact
    def __call__(self, x):
      site = 'encoder/mlp'
      mlp = Mlp(11, 17, True, 'gelu', site, model.adapter_map, name='mlp')
      hook = SublayerHook(site, model.adapter_map, name='around_mlp')
      return hook(mlp, lambda mlp, y: mlp(y, Context()), x, Context())

  layer = jax.tree.map(lambda a: a[0], params)
  cast = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
  name = model.adapter_map.entries[0][1].name
  variables = {
    'params': {'mlp': layer},
    'peft': {'around_mlp': {name: cast}},
  }
  return jax.jit(Sublayer().apply)(variables, jnp.asarray(x, jnp.float32))


def test_one_feed_forward_expert_is_lora_at_its_projections():
  together, _ = small.make('ffn_lora(rank=2)')
  apart, _ = small.make("lora(rank=2, targets='*/wi_0|*/wi_1|*/wo')")
  peft = small.variables('ffn_lora(rank=2)', noise=0.1)['peft']
  names = {'gate': 'wi_0', 'up': 'wi_1', 'down': 'wo'}
  arrays = {}
  for path, array in weight_mapping.flatten(peft).items():
    site, _, leaf = path.partition('/around_mlp/ffn_lora/')
    name, _, factor = leaf.rpartition('_')
    arrays[f'{site}/mlp/{names[name]}/lora/{factor}'] = array
  variables = {'params': small.params()}
  np.testing.assert_allclose(
    small.jitted(together)(variables | {'peft': peft}, small.batch()),
    small.jitted(apart)(
      variables | {'peft': weight_mapping.unflatten(arrays)}, small.batch()
    ),
    rtol=2e-5,
    atol=2e-5,
  )


def test_one_feed_forward_of_mixlora_is_ffn_lora():
  axes = {'a': 1, 'b': 0}
  sizes = {'gate': (11, 17), 'up': (11, 17), 'down': (17, 11)}
  tree = {}
  for name, (inputs, outputs) in sizes.items():
    tree[f'{name}_a'] = normal(f'{name}a', inputs, 2)
    tree[f'{name}_b'] = normal(f'{name}b', 2, outputs)
  one = {k: np.expand_dims(a, axes[k[-1]]) for k, a in tree.items()}
  one['router'] = {'kernel': normal('kernel', 11, 1)}
  params = small.params()['encoder']['layers']['mlp']
  x = normal('x', 2, 7, 11)
  alone, _ = small.make('ffn_lora(rank=2)')
  mixture, _ = small.make(
    'mixlora(experts=1, rank=2, alpha=16.0, router=softmax)'
  )
  np.testing.assert_allclose(
    feed_forward(mixture, params, one, x),
    feed_forward(alone, params, tree, x),
    rtol=1e-5,
    atol=1e-4,
  )


def test_an_adapter_of_an_activation_beside_whole_feed_forwards_is_refused():
  with pytest.raises(ValueError, match='mixlora has an activation of its own'):
    build("mixlora(experts=3) + ia3(targets='*/act')", SITES)


def test_mola_has_more_experts_in_higher_layers():
  # 32 layers in quarters: 2 experts in the first eight, 8 in the last.
  counts = layer_counts('inverted_triangle', 32)
  assert counts == (2,) * 8 + (4,) * 8 + (6,) * 8 + (8,) * 8
  assert layer_counts('triangle', 32) == counts[::-1]
  assert layer_counts('diamond', 4) == (2, 8, 8, 2)
  # 5 layers: 4 i // 5 is 0, 0, 1, 2, 3.
  assert layer_counts('inverted_triangle', 5) == (2, 2, 4, 6, 8)
  (mixture,) = {a for _, a in build('mola', SITES).adapter_map.entries}
  assert mixture.experts == 8
  (even,) = {a for _, a in build('mola(experts=5)', SITES).adapter_map.entries}
  assert (even.experts, even.experts_per_layer) == (5, ())
  assert canonical_text('mola(experts=10)') == 'mola(experts=10)'


def test_hydralora_shares_a_and_routes_b():
  by_path = shapes('hydralora(experts=3, rank=2)')
  layer = 'encoder/layers/mlp/wi_0/hydralora'
  assert by_path[f'{layer}/a'] == (2, 11, 2)
  assert by_path[f'{layer}/b'] == (2, 3, 2, 17)


def test_adamole_leaves_out_experts_below_the_token_s_threshold():
  # p = (0.7, 0.2, 0.1); the threshold is 1/3 sigmoid(0) = 1/6, so experts 0 and
  # 1 are left with 0.7 - 1/6 = 16/30 and 0.2 - 1/6 = 1/30: 16/17 and 1/17.
  router = ROUTERS['threshold'].module(experts=3)
  tree = {
    'kernel': jnp.log(jnp.array([[0.7, 0.2, 0.1]])),
    'threshold_kernel': jnp.zeros(1),
    'threshold_bias': jnp.float32(0),
  }
  routing = router.apply({'peft': tree}, jnp.ones((1, 1, 1)), Context())
  np.testing.assert_allclose(
    routing.combine_weights[0, 0], [16 / 17, 1 / 17, 0], rtol=1e-5
  )


def localized_loss(packed, delta):
  """(loss, weights, mask) of 3 examples of the tasks a, b, a over 4 experts."""
  router = ROUTERS['localized'].module(
    experts=4, tasks=('a', 'b'), group=('a',), delta=delta
  )
  lengths, tasks = (3, 5, 2), (1, 2, 1)
  tokens = [normal(f'example{i}', n, 11) for i, n in enumerate(lengths)]
  if packed:
    x = np.concatenate(tokens)[None]
    ids = np.repeat([1, 2, 3], lengths)[None]
    task_ids = np.repeat(tasks, lengths)[None]
    ctx = dict(
      segment_ids=jnp.asarray(ids), token_mask=jnp.ones_like(ids, bool)
    )
  else:
    x, mask = np.full((3, 5, 11), 9.0), np.zeros((3, 5), bool)
    for i, n in enumerate(lengths):
      x[i, :n], mask[i, :n] = tokens[i], True
    task_ids = np.array(tasks)[:, None] * mask
    ctx = dict(token_mask=jnp.asarray(mask))
  ctx = Context(task_ids=jnp.asarray(task_ids), **ctx)
  kernel = normal('kernel', 11, 4)
  routing = router.apply(
    {'peft': {'kernel': jnp.asarray(kernel, jnp.float32)}},
    jnp.asarray(x, jnp.float32),
    ctx,
  )
  sums = router_stats(routing, ctx.token_mask)
  weights = [softmax(t @ kernel) for t in tokens]
  return localized_balance(sums), weights


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('delta', [0.0, 0.25])
def test_loramoe_balances_experts_within_two_groups_of_tasks(packed, delta):
  loss, weights = localized_loss(packed, delta)
  expected = equations.localized_balance(weights, (True, False, True), delta)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_loramoe_s_loss_by_hand():
  # One token each of two groups, even weights of two experts, delta 1/2:
  # Z = ((3/4, 1/4), (1/4, 3/4)), mean 1/2, variance 4 (1/4)^2 / 3 = 1/12,
  # over 1/4: 1/3.
  even = [np.full((1, 2), 0.5)] * 2
  value = equations.localized_balance(even, (True, False), 0.5)
  np.testing.assert_allclose(value, 1 / 3, rtol=1e-6)


def test_smear_merges_the_parameters_of_an_example_s_prompt():
  mixture = adapter('smear', site='encoder/mlp')
  assert (mixture.combine, type(mixture.router)) == (
    'parameters',
    ROUTERS['sentence'].module,
  )


def test_flylora_keeps_a_as_drawn_and_weights_the_largest_projections():
  built = build('flylora(experts=4, router=magnitude(k=2))', SITES)
  assert any('flylora/a' in pattern for pattern in built.frozen_arrays)
  variables = small.variables('flylora(experts=4, router=magnitude(k=2))')
  trained, rest = router_state.split(variables['peft'], built.frozen_arrays)
  assert {p.split('/')[-1] for p in weight_mapping.flatten(trained)} == {'b'}
  leaves = {p.split('/')[-1] for p in weight_mapping.flatten(rest)}
  assert leaves == {'a', 'state_bias'}
  # Of d = 11 entries a quarter, 2, is not zero in each column, as large as 1/4.
  a = np.asarray(rest['encoder']['layers']['self']['q']['flylora']['a'])
  assert ((a != 0).sum(axis=1) == 2).all()
  assert 0.1 < a[a != 0].std() < 0.4
  # f(x) + 2 sum over the two largest |z + d| of z_e B_e.
  f, x, y, inside, outside = projection('q')
  a, b, d = (
    normal('a', *inside, 4, 1),
    normal('b', 4, 1, *outside),
    normal('d', 4),
  )
  module = adapter('flylora(experts=4, router=magnitude(k=2))')
  z = x @ a[..., 0]
  rank = np.argsort(np.argsort(-np.abs(z + d), -1), -1)
  expected = y + 2 * np.einsum('bte,enh->btnh', z * (rank < 2), b[:, 0])
  tree = {'a': a, 'b': b, 'router': {'state_bias': d}}
  np.testing.assert_allclose(call(module, tree, f, x), expected, **CLOSE)


def test_flylora_s_bias_moves_towards_even_loads():
  # 3 tokens that took 2 of 3 experts each: 3, 2, 1 times, 2 on average.
  sums = types.SimpleNamespace(
    share=jnp.array([3.0, 2.0, 1.0]), experts=3, available=None
  )
  router = magnitude.Magnitude(3, k=2, rate=0.5)
  state = magnitude.update(router, {'bias': jnp.array([0.25, 0.0, 0.0])}, sums)
  np.testing.assert_array_equal(state['bias'], [-0.25, 0, 0.5])


def test_arrow_s_prototypes_are_the_top_right_singular_vectors():
  a, b = normal('a', 5, 3, 7, 2), normal('b', 5, 2, 4)
  kernel = arrow.prototypes({'a': a, 'b': b})['kernel']
  for e in range(5):
    # The paper's matrices act on columns: B A here is (A B) transposed.
    matrix = (a[e].reshape(21, 2) @ b[e]).T
    top = np.linalg.svd(matrix)[2][0]
    # Up to the sign.
    np.testing.assert_allclose(np.abs(top @ kernel[:, e]), 1, rtol=1e-6)


def test_phatgoose_takes_the_two_adapters_whose_gates_point_to_the_token():
  # Gates of four features, e0 - e1, e1 - e0 and e2 - e3; the token is e0 - e1.
  # Their mean is 0 and their deviation sqrt(1/2), so that standardized all have
  # the squared length 4: the products are 4, -4 and 0, over sqrt(4) 2, -2, 0.
  kernel = jnp.array([[1.0, -1, 0], [-1, 1, 0], [0, 0, 1], [0, 0, -1]])
  router = ROUTERS['phatgoose'].module(experts=3, k=2)
  routing = router.apply(
    {'peft': {'kernel': kernel}}, kernel[:, 0][None, None], Context()
  )
  first = 1 / (1 + np.exp(-2))
  np.testing.assert_allclose(
    routing.combine_weights[0, 0], [first, 0, 1 - first], rtol=1e-4
  )


def test_hardrouted_takes_one_expert_for_a_whole_feed_forward():
  method = 'hardrouted(experts=3, rank=2)'
  model, _ = small.make(method)
  variables = small.variables(method, noise=0.3)
  routers = {
    p for p in weight_mapping.flatten(variables['peft']) if 'router' in p
  }
  assert routers == {
    f'{side}/layers/mlp/wi_0/hardrouted/router/kernel'
    for side in ('encoder', 'decoder')
  }
  _, sown = jax.jit(functools.partial(model.apply, mutable=['weights']))(
    variables, small.batch()
  )
  (weights,) = sown['weights']['encoder']['layers']['mlp']['wi_0'][
    'hardrouted'
  ]['weights']
  chosen = np.argmax(weights, -1)
  np.testing.assert_array_equal(weights, np.eye(3)[chosen])
  assert len(np.unique(chosen)) == 3
  # The gate, up- and down-projection of expert e, of d 11 and f 17, at the
  # first layer of the encoder.
  params = small.params()['encoder']['layers']['mlp']
  layer = jax.tree.map(lambda a: np.asarray(a[0]), params)
  tree = variables['peft']['encoder']['layers']['mlp']
  x = normal('x', 2, 7, 11)

  def projected(y, name, e):
    a, b = (np.asarray(tree[name]['hardrouted'][leaf][0]) for leaf in 'ab')
    # Alpha 256 over a rank of 2.
    return y @ layer[name]['kernel'] + 128 * (y @ a[:, e]) @ b[e]

  kernel = np.asarray(tree['wi_0']['hardrouted']['router']['kernel'][0])
  chosen = np.argmax(x @ kernel, -1)
  expected = np.zeros_like(x)
  for e in range(3):
    gate = np.asarray(jax.nn.gelu(projected(x, 'wi_0', e)))
    y = projected(gate * projected(x, 'wi_1', e), 'wo', e)
    expected += np.where((chosen == e)[..., None], y, 0)
  actual = whole_feed_forward(
    model, layer, jax.tree.map(lambda a: a[0], tree), x
  )
  # The rank's scale of 128 makes the outputs large.
  np.testing.assert_allclose(
    actual, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
  )


def whole_feed_forward(model, params, tree, x):
  """A feed-forward of a T5 layer with adapters inside."""
  ctx = Context().at_layer(jnp.int32(0))
  mlp = Mlp(11, 17, True, 'gelu', 'encoder/mlp', model.adapter_map)
  cast = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, tree))
  variables = {'params': cast[0], 'peft': cast[1]}
  return jax.jit(lambda v, x: mlp.apply(v, x, ctx))(
    variables, jnp.asarray(x, jnp.float32)
  )


def test_comol_is_lora_with_a_core_merged_for_each_token():
  f, x, y, inside, outside = projection('q')
  a, b = normal('a', *inside, 2), normal('b', 2, *outside)
  core, kernel = normal('core', 3, 2, 2), normal('kernel', 2, 3)
  module = adapter('comol(experts=3, rank=2, alpha=5.0)')
  # The router reads x A.
  p = softmax(x @ a @ kernel)
  merged = np.einsum('bte,erq->btrq', p, core)
  expected = y + 5 / 2 * np.einsum('btd,dr,btrq,qnh->btnh', x, a, merged, b)
  tree = {'a': a, 'b': b, 'core': core, 'router': {'kernel': kernel}}
  np.testing.assert_allclose(call(module, tree, f, x), expected, **CLOSE)


@pytest.mark.parametrize('combine', ['outputs', 'parameters'])
@pytest.mark.parametrize('share', ['', 'down', 'up'])
def test_bottlenecks_mix_outputs_or_parameters(combine, share):
  # A sublayer of d 11 that doubles its input; 3 experts of size 4.
  e_down, e_up = (() if share == name else (3,) for name in ('down', 'up'))
  tree = {
    'down': normal('down', 11, *e_down, 4),
    'down_bias': normal('down_bias', *e_down, 4),
    'up': normal('up', *e_up, 4, 11),
    'up_bias': normal('up_bias', *e_up, 11),
    'router': {'kernel': normal('kernel', 11, 3)},
  }
  x = normal('x', 2, 7, 11)
  y = 2 * x
  p = softmax(x @ tree['router']['kernel'])

  def of(name, e):
    axis = 1 if name == 'down' else 0
    shared = name.startswith(share) if share else False
    return tree[name] if shared else np.take(tree[name], e, axis)

  def bottleneck(down, down_bias, up, up_bias):
    return np.maximum(y @ down + down_bias, 0) @ up + up_bias

  names = ('down', 'down_bias', 'up', 'up_bias')
  if combine == 'outputs':
    expected = y + sum(
      p[..., e, None] * bottleneck(*(of(name, e) for name in names))
      for e in range(3)
    )
  else:
    # One bottleneck for each token, of the weighted sums of the parameters.
    expected = y.copy()
    for place in np.ndindex(2, 7):
      merged = [
        sum(p[place][e] * of(name, e) for e in range(3)) for name in names
      ]
      hidden = np.maximum(y[place] @ merged[0] + merged[1], 0)
      expected[place] += hidden @ merged[2] + merged[3]
  text = (
    f"mixture(expert=bottleneck(size=4), experts=3, combine='{combine}', "
    f"share='{share}')"
  )
  module = adapter(text, site='encoder/mlp')
  layer = BaseLayer(lambda x: 2 * x)
  np.testing.assert_allclose(call(module, tree, layer, x), expected, **CLOSE)


@pytest.mark.parametrize('share', ['', 'a', 'b'])
def test_combined_parameters_are_one_adapter_of_the_weighted_sums(share):
  f, x, y, inside, outside = projection('q')
  a = normal('a', *inside, *([] if share == 'a' else [13]), 19)
  b = normal('b', *([] if share == 'b' else [13]), 19, *outside)
  kernel = normal('kernel', 11, 13)
  text = (
    'mixture(expert=lora(rank=19, alpha=3.0), experts=13, '
    f"combine='parameters', share='{share}')"
  )
  p = softmax(x @ kernel)
  a_x = (
    np.einsum('bte,der->btdr', p, a)
    if share != 'a'
    else np.broadcast_to(a, (2, 7, *a.shape))
  )
  b_x = (
    np.einsum('bte,ernh->btrnh', p, b)
    if share != 'b'
    else np.broadcast_to(b, (2, 7, *b.shape))
  )
  expected = y + 3 / 19 * np.einsum('btd,btdr,btrnh->btnh', x, a_x, b_x)
  tree = {'a': a, 'b': b, 'router': {'kernel': kernel}}
  np.testing.assert_allclose(
    call(adapter(text), tree, f, x), expected, rtol=1e-3, atol=1e-3
  )


def test_mhr_merges_each_part_of_the_inputs_and_outputs_apart():
  # Inputs of 11, in parts of 6 and 5; outputs of 3 x 5, of 8 and 7.
  f, x, y, inside, outside = projection('q')
  a, b = normal('a', *inside, 3, 2), normal('b', 3, 2, *outside)
  module = adapter("mhr(experts=3, rank=2, router=poly(tasks=['a'], splits=2))")
  table = normal('table', 2, 2, 3)
  z = 1 / (1 + np.exp(-table[1]))
  w = z / z.sum(-1, keepdims=True)
  flat = b.reshape(3, 2, 15)
  merged_a = np.concatenate(
    [
      np.einsum('e,der->dr', w[0], a[:6]),
      np.einsum('e,der->dr', w[1], a[6:]),
    ]
  )
  merged_b = np.concatenate(
    [
      np.einsum('e,ero->ro', w[0], flat[..., :8]),
      np.einsum('e,ero->ro', w[1], flat[..., 8:]),
    ],
    axis=1,
  )
  expected = y + 1 / 2 * (x @ merged_a @ merged_b).reshape(y.shape)
  tree = {'a': a, 'b': b, 'router': {'table': table}}
  ctx = Context(task_ids=jnp.ones(x.shape[:2], jnp.int32))
  np.testing.assert_allclose(call(module, tree, f, x, ctx), expected, **CLOSE)


@pytest.mark.parametrize('options', ["combine='outputs'", "share='a'"])
def test_splits_weight_parameters_that_experts_do_not_share(options):
  method = f"mhr(router=poly(tasks=['a'], splits=2), {options})"
  model, _ = small.make(method)
  with pytest.raises(ValueError, match='a router with splits=2 weights parts'):
    param_metadata(model, small.batch())


def test_shared_experts_are_always_on_and_identity_experts_add_nothing():
  f, x, y, inside, outside = projection('q')
  # The router has 3 experts and 2 identities; one more expert is always on.
  a, b = normal('a', *inside, 4, 2), normal('b', 4, 2, *outside)
  kernel = normal('kernel', 11, 5)
  module = adapter(
    'molora(experts=3, rank=2, alpha=2.0, shared_experts=1, identity_experts=2)'
  )
  p = softmax(x @ kernel)[..., :3]
  p = np.concatenate([p, np.ones((2, 7, 1))], -1)
  expected = y + np.einsum('btd,der,bte,ernh->btnh', x, a, p, b)
  tree = {'a': a, 'b': b, 'router': {'kernel': kernel}}
  np.testing.assert_allclose(call(module, tree, f, x), expected, **CLOSE)


def test_adamix_draws_an_expert_and_then_merges_all():
  # d 11, size 2, 3 experts: in training a row has one projection down, after
  # it all rows have their mean; the projection up is shared.
  f, x = BaseLayer(lambda x: x), jnp.asarray(normal('x', 5, 7, 11), jnp.float32)
  mixture = adapter(
    'adamix(experts=3, size=2, activation=relu)', site='encoder/mlp'
  )
  tree = {
    'down': normal('down', 11, 3, 2),
    'down_bias': normal('down_bias', 3, 2),
    'up': normal('up', 2, 11),
    'up_bias': normal('up_bias', 11),
  }

  def bottleneck(down, bias):
    return x + np.maximum(x @ down + bias, 0) @ tree['up'] + tree['up_bias']

  down, bias = tree['down'], tree['down_bias']
  merged = bottleneck(down.mean(1), bias.mean(0))
  np.testing.assert_allclose(call(mixture, tree, f, x), merged, rtol=1e-4)
  each = [bottleneck(down[:, e], bias[e]) for e in range(3)]
  drawn = mixture.apply(
    {'peft': jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)},
    *(f, x, Context(train=True)),
    rngs={'router': jax.random.key(0)},
  )
  chosen = {
    next(e for e in range(3) if np.allclose(row, each[e][i], rtol=1e-4))
    for i, row in enumerate(np.asarray(drawn))
  }
  assert len(chosen) > 1


def test_mode_routes_each_column_over_rank_one_experts():
  # y = f(x) + 5 / 2 sum_r (x A_r) sum_e p_re B_er, p_r = softmax(x W_r).
  f, x, y, inside, outside = projection('q')
  tree = {
    'a': normal('a', *inside, 2),
    'b': normal('b', 3, 2, *outside),
    'router': {'kernel': normal('kernel', 2, 11, 3)},
  }
  mixture = adapter('mode(experts=3, rank=2, alpha=5.0)')
  expected = y
  for r in range(2):
    p = softmax(x @ tree['router']['kernel'][r])
    column = x @ tree['a'][:, r]
    for e in range(3):
      weight = 5 / 2 * column * p[..., e]
      expected = expected + np.multiply.outer(weight, tree['b'][e, r])
  np.testing.assert_allclose(
    call(mixture, tree, f, x), expected, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  'options',
  [
    'router=magnitude',
    'router=random',
    'router=arrow',
    'combine=parameters',
  ],
)
def test_columns_need_routers_that_can_be_repeated(options):
  with pytest.raises(ValueError, match='drop by_column'):
    build(f'mode({options})', SITES)
