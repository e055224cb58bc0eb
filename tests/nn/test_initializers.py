# SPDX-License-Identifier: Apache-2.0
"""A model's first weights, drawn on the host."""

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.models import weight_mapping
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import Constant, Normal, init_params
from moepeft.peft import METHODS, build
from moepeft.peft.method import Method

from ..contracts import small
from ..contracts.probes import Dora

SITES = t5.sites(small.GATED)


def peft(method, seed=0, config=small.GATED, **options):
  advice = build(method, SITES).adapter_map
  model = t5.T5(config, advice, **options)
  return weight_mapping.flatten(init_params(model, small.batch(), seed)['peft'])


def assert_same(one, two):
  for path, array in one.items():
    np.testing.assert_array_equal(array, two[path], err_msg=path)


def test_an_array_draws_the_same_whatever_is_beside_it():
  alone = peft('molora(experts=3, rank=2)')
  beside = peft('molora(experts=3, rank=2) + ia3', unroll=2)
  assert len(beside) > len(alone)
  assert_same(alone, beside)


def test_seeds_and_paths_draw_apart():
  one, two = peft('lora(rank=2)'), peft('lora(rank=2)', seed=1)
  k, v = (f'encoder/layers/self/{name}/lora/a' for name in 'kv')
  assert not np.array_equal(one[k], two[k])
  assert not np.array_equal(one[k], one[v])
  assert not np.array_equal(one[k][0], one[k][1])


def test_flax_draws_from_the_same_distributions():
  shape = (50, 400)
  actual = Normal(0.3).draw(np.random.default_rng(0), shape, np.float32)
  reference = Normal(0.3)(jax.random.key(0), shape, jnp.float32)
  for drawn in (actual, reference):
    # 20,000 draws: the deviation is good to 0.5 %, the mean to 0.0021.
    np.testing.assert_allclose(np.std(drawn), 0.3, rtol=0.025)
    assert abs(np.mean(drawn)) < 0.011
  actual = Constant(2).draw(np.random.default_rng(0), (3,), np.float32)
  np.testing.assert_array_equal(actual, Constant(2)(None, (3,), np.float32))


def test_every_array_of_init_is_drawn_with_its_shape_and_dtype():
  model = t5.T5(
    small.RELU,
    build('mov(experts=3)', t5.sites(small.RELU)).adapter_map,
    param_dtype=jnp.bfloat16,
  )
  expected = jax.eval_shape(lambda: model.init(small.RNGS, small.batch()))
  actual = init_params(model, small.batch(), 0)
  expected = {key: expected[key] for key in ('params', 'peft')}
  target, drawn = map(weight_mapping.flatten, (expected, actual))
  assert target.keys() == drawn.keys()
  for path, leaf in target.items():
    assert (drawn[path].shape, drawn[path].dtype) == (leaf.shape, leaf.dtype)


def test_what_depends_on_the_base_is_computed_from_the_base_at_hand():
  methods = dict(METHODS) | {
    'dora': Method(module=Dora, roles={'official': ('query',), 'paper': ()})
  }
  built = build('dora', SITES, methods=methods)
  params = small.params()
  actual = init_params(
    t5.T5(small.GATED, built.adapter_map), small.batch(), 5, params
  )
  kernel = params['encoder']['layers']['self']['q']['kernel']
  magnitude = actual['peft']['encoder']['layers']['self']['q']['dora']
  # The norm over the input axis d of [l, d, n, h]; float32 sums of 11 squares.
  np.testing.assert_allclose(
    magnitude['magnitude'], np.sqrt(np.sum(kernel**2, axis=1)), rtol=1e-6
  )
