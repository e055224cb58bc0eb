# SPDX-License-Identifier: Apache-2.0
"""Methods compute the same as NumPy written out; paper against official.

Axes: b 2, t 7, d 11, n 3, h 5; e 13 experts of rank r 19.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context, Routing
from moepeft.models.t5 import model as t5
from moepeft.moe import aux_losses, router_stats
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.linear import base_projection
from moepeft.peft import build
from moepeft.peft.methods.lora import METHOD as LORA

from ..contracts import small

E, R = 13, 19
PROJECTIONS = {
  # equation, input features, output features
  'q': ('btd,dnh->btnh', (11,), (3, 5)),
  'o': ('btnh,nhd->btd', (3, 5), (11,)),
  'wo': ('btf,fd->btd', (17,), (11,)),
}
every_projection = pytest.mark.parametrize('place', PROJECTIONS)
# Float32 sums of 13 x 19 products against float64.
CLOSE = dict(rtol=1e-4, atol=1e-4)


def normal(name, *shape):
  """Draws of a name's own, whatever tests ran before."""
  return np.random.default_rng(list(name.encode())).standard_normal(shape)


def adapter(method, semantics='official', site='encoder/self/k'):
  (actual,) = build(method, t5.sites(small.GATED), semantics).adapter_map.at(
    site
  )
  return actual


def projection(place):
  """(f, x, f(x), A's input features, B's output features)."""
  eqn, inside, outside = PROJECTIONS[place]
  x, kernel = normal('x', 2, 7, *inside), normal('w', *inside, *outside)
  f = base_projection(eqn, jnp.asarray(kernel, jnp.float32), jnp.float32)
  return f, x, np.einsum(eqn, x, kernel), inside, outside


def call(module, tree, f, x, ctx=None):
  cast = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (tree, x))
  ctx = ctx or Context()
  run = jax.jit(lambda tree, x: module.apply({'peft': tree}, f, x, ctx))
  return run(*cast)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def size(features):
  return int(np.prod(features))


@every_projection
@pytest.mark.parametrize(
  ('options', 'scale'),
  [
    # 16 / r where nothing is said.
    ('', 16 / 19),
    (', alpha=3.0', 3 / 19),
    (', alpha=3.0, rslora=True', 3 / np.sqrt(19)),
  ],
)
def test_lora_adds_its_product_scaled(place, options, scale):
  f, x, y, inside, outside = projection(place)
  a, b = normal('a', *inside, R), normal('b', R, *outside)
  site = 'encoder/mlp/wo' if place == 'wo' else f'encoder/self/{place}'
  module = adapter(f'lora(rank=19{options})', site=site)
  term = x.reshape(2, 7, -1) @ a.reshape(-1, R) @ b.reshape(R, -1)
  actual = call(module, {'a': a, 'b': b}, f, x)
  np.testing.assert_allclose(actual, y + scale * term.reshape(y.shape), **CLOSE)
  # Merged, it is the same.
  kernel = jnp.asarray(f.kernel())
  merged = LORA.merge({'a': a, 'b': b}, kernel, adapter=module, eqn=f.eqn)
  np.testing.assert_allclose(np.einsum(f.eqn, x, merged), actual, **CLOSE)


@every_projection
@pytest.mark.parametrize(
  ('options', 'alpha'), [('', 16.0), (', alpha=3.0', 3.0)]
)
def test_molora_mixes_the_outputs_of_its_experts(place, options, alpha):
  f, x, y, inside, outside = projection(place)
  a, b = normal('a', *inside, E, R), normal('b', E, R, *outside)
  kernel = normal('kernel', size(inside), E)
  site = 'encoder/mlp/wo' if place == 'wo' else f'encoder/self/{place}'
  module = adapter(f'molora(experts=13, rank=19{options})', site=site)
  flat = x.reshape(2, 7, -1)
  p = softmax(flat @ kernel)
  expected = y.copy()
  for e in range(E):
    one = flat @ a.reshape(-1, E, R)[:, e] @ b[e].reshape(R, -1)
    expected += p[..., e].reshape(2, 7, *[1] * len(outside)) * (
      alpha / R * one.reshape(y.shape)
    )
  tree = {'a': a, 'b': b, 'router': {'kernel': kernel}}
  np.testing.assert_allclose(call(module, tree, f, x), expected, **CLOSE)


READS = {
  # What the router's kernel has in front of its experts, and what it reads
  # of x and y = f(x); the weights of a head where each has its own.
  'heads': (5, lambda x, y: y),
  'output': (15, lambda x, y: y.reshape(2, 7, 1, 15)),
  'input': (11, lambda x, y: x.reshape(2, 7, 1, 11)),
}


@pytest.mark.parametrize('reads', READS)
def test_mov_reads_what_it_says(reads):
  features, seen = READS[reads]
  f, x, y, _, _ = projection('q')
  module = adapter(f"mov(experts=13, reads='{reads}')")
  started = jax.eval_shape(
    lambda: module.init({'peft': jax.random.key(0)}, f, x, Context())
  )['peft']
  assert started['router']['kernel'].shape == (features, E)
  assert started['scale'].shape == (E, 3, 5)
  kernel, scale = normal('kernel', features, E), normal('scale', E, 3, 5)
  p = softmax(seen(x, y) @ kernel)
  p = np.broadcast_to(p, (2, 7, 3, E))
  expected = np.zeros(y.shape)
  for n in range(3):
    expected[:, :, n] = y[:, :, n] * (p[:, :, n] @ scale[:, n])
  tree = {'scale': scale, 'router': {'kernel': kernel}}
  np.testing.assert_allclose(call(module, tree, f, x), expected, **CLOSE)


@pytest.mark.parametrize('reads', READS)
def test_mov_without_heads_reads_the_activation(reads):
  # A tap has no weight: its input is its output.
  x = normal('x', 2, 7, 17)
  f = BaseLayer(lambda x: x, shape=(17,))
  kernel, scale = normal('kernel', 17, E), normal('scale', E, 17)
  module = adapter(f"mov(experts=13, reads='{reads}')", site='encoder/mlp/act')
  tree = {'scale': scale, 'router': {'kernel': kernel}}
  expected = x * (softmax(x @ kernel) @ scale)
  np.testing.assert_allclose(call(module, tree, f, x), expected, **CLOSE)


@pytest.mark.parametrize(
  ('semantics', 'option', 'renormalised'),
  [
    ('official', '', False),
    ('paper', '', True),
    ('official', ', renormalize=True', True),
    ('paper', ', renormalize=False', False),
  ],
)
def test_topk_is_renormalised_in_the_paper_only(
  semantics, option, renormalised
):
  method = f'molora(experts=13, rank=19, router=topk(k=2{option}))'
  module = adapter(method, semantics)
  f, x, y, inside, outside = projection('q')
  a, b, kernel = (
    normal('a', *inside, E, R),
    normal('b', E, R, *outside),
    normal('kernel', 11, E),
  )
  p = softmax(x @ kernel)
  p = np.where(p >= np.sort(p, axis=-1)[..., -2:-1], p, 0)
  assert (np.sum(p > 0, axis=-1) == 2).all() and p.sum(-1).mean() < 0.95
  if renormalised:
    p /= p.sum(-1, keepdims=True)
  each = np.einsum('btd,der,ernh->btenh', x, a, b, optimize=True)
  expected = y + 16 / R * np.einsum('bte,btenh->btnh', p, each)
  tree = {'a': a, 'b': b, 'router': {'kernel': kernel}}
  np.testing.assert_allclose(call(module, tree, f, x), expected, **CLOSE)


def test_semantics_decide_what_the_text_leaves_open():
  sites = t5.sites(small.GATED)
  official, paper = (build('mov', sites, s) for s in ('official', 'paper'))
  assert "reads='heads'" in official.method
  assert "reads='output'" in paper.method
  said = build("mov(reads='input')", sites, 'paper').method
  assert "reads='input'" in said and 'output' not in said


@pytest.mark.parametrize('method', ['lora', 'molora'])
def test_the_linear_half_of_the_gate_is_adapted_in_the_paper_only(method):
  sites = t5.sites(small.GATED)
  official, paper = (
    {path for path, _ in build(method, sites, s).adapter_map.entries}
    for s in ('official', 'paper')
  )
  assert paper - official == {'encoder/mlp/wi_1', 'decoder/mlp/wi_1'}
  assert official < paper and 'decoder/cross/o' in official


@pytest.mark.parametrize('method', ['ia3', 'mov'])
@pytest.mark.parametrize('semantics', ['official', 'paper'])
def test_vectors_act_on_keys_values_and_the_activation(method, semantics):
  built = build(method, t5.sites(small.GATED), semantics)
  attentions = ('encoder/self', 'decoder/self', 'decoder/cross')
  assert {path for path, _ in built.adapter_map.entries} == {
    *(f'{attention}/{letter}' for attention in attentions for letter in 'kv'),
    'encoder/mlp/act',
    'decoder/mlp/act',
  }


@pytest.mark.parametrize('on', ['output', 'input'])
def test_ia3_scales_features(on):
  f, x, y, inside, outside = projection('q')
  scale = normal('scale', *(outside if on == 'output' else inside))
  module = adapter(f"ia3(on='{on}')")
  expected = (
    y * scale
    if on == 'output'
    else np.einsum(f.eqn, x * scale, np.asarray(f.kernel()))
  )
  np.testing.assert_allclose(
    call(module, {'scale': scale}, f, x), expected, **CLOSE
  )


@jax.jit
def sums_of(logits):
  routing = Routing(logits, jax.nn.softmax(logits))
  return router_stats.router_stats(routing, None)


def test_the_entropy_loss_is_the_mean_entropy_in_nats():
  # Uniform over 3: ln 3. With probabilities 3/4 and 1/4: 3/4 ln 4/3 + 1/4 ln 4.
  uniform = aux_losses.entropy(sums_of(jnp.zeros((2, 7, 3))))
  np.testing.assert_allclose(uniform, np.log(3), rtol=1e-6)
  sharp = jnp.broadcast_to(jnp.array([np.log(3), 0.0]), (2, 7, 2))
  expected = 0.75 * np.log(4 / 3) + 0.25 * np.log(4)
  np.testing.assert_allclose(
    aux_losses.entropy(sums_of(sharp)), expected, rtol=1e-6
  )
  total = aux_losses.auxiliary_loss({'a': sums_of(sharp)}, {'entropy': 2.0})
  np.testing.assert_allclose(total, 2 * expected, rtol=1e-6)


def test_minimising_entropy_sharpens_routing():
  slope = jax.jit(jax.grad(lambda logits: aux_losses.entropy(sums_of(logits))))(
    jnp.array([[[1.0, 0.0]]])
  )
  assert float(slope[0, 0, 0]) < 0 < float(slope[0, 0, 1])


def test_the_z_loss_is_the_mean_squared_log_partition():
  # log(e^a + e^a) = a + ln 2
  actual = aux_losses.router_z_loss(sums_of(jnp.full((2, 7, 2), 1.5)))
  np.testing.assert_allclose(actual, (1.5 + np.log(2)) ** 2, rtol=1e-6)
