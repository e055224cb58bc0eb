# SPDX-License-Identifier: Apache-2.0
"""One mixture can have experts of several kinds, each at sites of its own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.checkpoints.adapter import load
from moepeft.core.types import Context
from moepeft.models import weight_mapping
from moepeft.models.t5 import model as t5
from moepeft.moe import router_stats
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.peft import build
from moepeft.peft.build import function_of
from moepeft.peft.method_text import canonical_text, expanded_text

from ..contracts import small
from ..inference import banked
from ..reference import router_equations as equations
from .test_semantics import CLOSE, adapter, call, normal, projection, softmax

Q = 'encoder/self/q'
SITES = t5.sites(small.GATED)
TWO = '[lora(rank=2), moslora(rank=3)]'
AT = "targets='*/q|*/wo'"


def test_moa_gives_each_site_the_gate_of_its_kind_from_one_router():
  # d 11; 6 gates of 4 x 6 hidden units, read at q. The first weights LoRA at q,
  # the second LoRA at k, the sixth the bottleneck beside the feed-forward,
  # which has another input, z.
  modules = {
    site: adapter('moa(rank=2, size=3)', site=f'encoder/{site}')
    for site in ('self/q', 'self/k', 'mlp')
  }
  f, x, projected, _, _ = projection('q')
  z = normal('z', 2, 7, 11)
  router = {
    'gate_kernel': normal('gate', 11, 24),
    'gate_bias': normal('gate_bias', 24),
    'up_kernel': normal('up', 11, 24),
    'up_bias': normal('up_bias', 24),
    'kernel': normal('kernel', 24, 6),
    'bias': normal('bias', 6),
  }
  q, k = (
    {'a': normal(f'{n}a', 11, 1, 2), 'b': normal(f'{n}b', 1, 2, 3, 5)}
    for n in 'qk'
  )
  bottleneck = {
    'down': normal('down', 11, 1, 3),
    'down_bias': normal('down_bias', 1, 3),
    'up': normal('up', 1, 3, 11),
    'up_bias': normal('up_bias', 1, 11),
  }
  trees = {
    'self/q': {'router': router, 'lora': q},
    'self/k': {'lora_2': k},
    'mlp': {'bottleneck': bottleneck},
  }

  @jax.jit
  def layer(trees, x, z):
    ctx = Context().at_layer(jnp.int32(0))
    mlp = BaseLayer(lambda z: 2 * z)
    at = {'self/q': (f, x), 'self/k': (f, x), 'mlp': (mlp, z)}
    return {
      site: modules[site].apply({'peft': trees[site]}, layer, inputs, ctx)
      for site, (layer, inputs) in at.items()
    }

  actual = layer(*in_float32(trees, x, z))
  gates = equations.sigmoid(equations.swiglu(x, **router))
  for site, tree, gate in (('self/q', q, 0), ('self/k', k, 1)):
    # alpha 8 over a rank of 2.
    low = 8 / 2 * gates[..., gate, None] * (x @ tree['a'][:, 0])
    expected = projected + np.einsum('btr,rnh->btnh', low, tree['b'][0])
    np.testing.assert_allclose(actual[site], expected, **CLOSE)
  hidden = z @ bottleneck['down'][:, 0] + bottleneck['down_bias'][0]
  hidden = hidden * equations.sigmoid(hidden)
  term = hidden @ bottleneck['up'][0] + bottleneck['up_bias'][0]
  expected = 2 * z + gates[..., 5, None] * term
  np.testing.assert_allclose(actual['mlp'], expected, **CLOSE)


def in_float32(*trees):
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), trees)


def test_kinds_at_one_site_add_their_terms_with_their_parts_of_the_weights():
  # Two experts each; the router's softmax is over all four.
  f, x, y, inside, outside = projection('q')
  module = adapter(
    f'mixture(expert={TWO}, experts=2, share_routing=False, {AT})',
    site=Q,
  )
  low = {'a': normal('a', *inside, 2, 2), 'b': normal('b', 2, 2, *outside)}
  core = {
    'a': normal('ca', *inside, 2, 3),
    'core': normal('core', 2, 3, 3),
    'b': normal('cb', 2, 3, *outside),
  }
  kernel = normal('kernel', 11, 4)
  tree = {'lora': low, 'moslora': core, 'router': {'kernel': kernel}}
  actual = call(module, tree, f, x)
  p = softmax(x @ kernel)
  expected = y + 16 / 2 * np.einsum(
    'btd,der,bte,ernh->btnh', x, low['a'], p[..., :2], low['b']
  )
  expected += (
    16
    / 3
    * np.einsum(
      'btd,der,bte,erq,eqnh->btnh',
      *(x, core['a'], p[..., 2:], core['core'], core['b']),
    )
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_a_list_of_one_kind_is_the_mixture_of_that_kind():
  listed = 'mixture(expert=[lora(rank=2)], experts=3)'
  plain = 'mixture(expert=lora(rank=2), experts=3)'
  assert canonical_text(listed) == canonical_text(plain)
  assert build(listed, SITES) == build(plain, SITES)


def test_two_equal_kinds_are_one_mixture_of_all_their_experts():
  # The first two experts are of one kind, the others of the other.
  f, x, _, inside, outside = projection('q')
  a, b = normal('a', *inside, 4, 2), normal('b', 4, 2, *outside)
  router = {'kernel': normal('kernel', 11, 4)}
  plain = adapter(f'mixture(expert=lora(rank=2), experts=4, {AT})', site=Q)
  listed = adapter(
    'mixture(expert=[lora(rank=2), lora(rank=2)], experts=2, '
    f'share_routing=False, {AT})',
    site=Q,
  )
  split = {
    'lora': {'a': a[:, :2], 'b': b[:2]},
    'lora_2': {'a': a[:, 2:], 'b': b[2:]},
    'router': router,
  }
  np.testing.assert_allclose(
    call(listed, split, f, x),
    call(plain, {'a': a, 'b': b, 'router': router}, f, x),
    **CLOSE,
  )


KINDS = (
  f'mixture(expert={TWO}, experts=2)',
  "mixture(expert=[lora(targets='*/q'), lora(rank=8, targets='*/k')])",
  'mixture(expert=[lora(rank=2), bottleneck(size=3), prefix], router=sigmoid)',
  'moa(rank=2, size=3)',
  "moa(targets='encoder/*')",
)


@pytest.mark.parametrize('method', KINDS)
def test_a_text_of_kinds_comes_back_from_what_is_built(method):
  built = build(method, SITES)
  assert build(built.method, SITES) == built
  assert canonical_text(built.method) == canonical_text(method)
  whole = build(expanded_text(method), SITES)
  assert function_of(whole.adapter_map) == function_of(built.adapter_map)


def test_texts_of_the_same_kinds_are_one():
  one = 'mixture(expert=[bottleneck, lora(targets="*/q", rank=2)], experts=10)'
  other = (
    "mixture(expert=[bottleneck(size=16), lora(rank=2, targets='*/q')], "
    'share_routing=True)'
  )
  assert canonical_text(one) == canonical_text(other)
  # Their order says which weights they have.
  turned = "mixture(expert=[lora(rank=2, targets='*/q'), bottleneck])"
  assert canonical_text(one) != canonical_text(turned)


def test_a_layer_has_one_router_of_its_kinds_and_counts_it_once():
  # k and v of the cross-attention read the encoder, whose tokens are routed at
  # k; all else in a layer is routed at q.
  model, _ = small.make('moa(rank=2, size=3)')
  shapes = jax.eval_shape(lambda: model.init(small.RNGS, small.batch()))
  routers = {
    path.partition('/router/')[0]
    for path in weight_mapping.flatten(shapes['peft'])
    if '/router/' in path
  }
  assert routers == {
    'encoder/layers/self/q/moa',
    'decoder/layers/self/q/moa',
    'decoder/layers/cross/k/moa',
  }
  sums_by_site = router_stats.collect(shapes['routing'])
  assert sums_by_site.keys() == routers
  # Two layers, and a share for each of the six kinds.
  assert sums_by_site['encoder/layers/self/q/moa'].share.shape == (2, 6)


@pytest.mark.parametrize(
  ('method', 'sentence'),
  [
    ('mixture(expert=[])', r'has an expert like lora .*; got \(\)'),
    ('mixture(expert=[3, lora])', 'has experts like lora .*; got 3'),
    ('mixture(expert=[lora, loraa])', "no method 'loraa'; did you mean 'lora'"),
    ('mixture(expert=[lora, mixture])', 'mixture cannot be one of several'),
    # Its weights have to sum to one.
    ('mixture(expert=[lora, ia3])', 'ia3 cannot be one of several .*; lora, '),
    ('mixture(expert=[lora(rank=0), lora])', "lora's option rank is at least"),
    ('mixture(expert=[lora, lora], rank=4)', 'mixture has no option rank'),
    ("moa(share='a')", 'moa has no option share'),
    (f'mixture(expert={TWO}, experts_per_layer=[2, 3])', 'drop experts_per'),
    (
      f'mixture(expert={TWO}, share_routing=False, reads=down)',
      'no down-projection in common; drop reads',
    ),
    (f'mixture(expert={TWO}, reads=output)', "write reads='input'"),
    (
      'mixture(expert=[lora(init_weights=svd_chunks), bottleneck])',
      'that start at zero, .*; drop init_weights',
    ),
    (
      "mixture(expert=[lora, bottleneck], targets='*/q')",
      'mixture: bottleneck finds no site',
    ),
    (
      'mixture(expert=[lora, bottleneck], share_routing=False)',
      'not all kinds of experts are at encoder/self, .* share_routing=True',
    ),
  ],
)
def test_kinds_that_cannot_be_mixed_are_one_clear_sentence(method, sentence):
  with pytest.raises(ValueError, match=sentence):
    build(method, SITES)


@pytest.mark.slow
def test_an_adapter_of_several_kinds_is_written_and_read(tmp_path):
  base = banked.base_of(small.GATED)
  path, built, tree = banked.save(tmp_path / 'moa', base, 'moa(rank=2, size=3)')
  read, card = load(path)
  chex.assert_trees_all_equal(read, tree)
  assert build(card['method'], SITES, card['semantics']) == built
