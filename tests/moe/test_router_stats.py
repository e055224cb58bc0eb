# SPDX-License-Identifier: Apache-2.0
"""Routing sums as they leave a model: each over the tokens its site reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.moe import router_stats

from ..contracts import small

METHOD = (
  "molora(experts=3, rank=2, targets='*/q|*/v|*/wo') + "
  "mov(experts=3, targets='*/k|*/act')"
)
# Two rows of 7 source and 5 target tokens; then as many with padding.
ROWS, S, T, WIDE_S, WIDE_T = 2, 7, 5, 11, 8
SOURCE, TARGET = ROWS * S, ROWS * T


@functools.cache
def sums(padded):
  """{site: Sums} of the same tokens, with padding or without."""
  rng = np.random.default_rng(0)
  sides = {
    'inputs': (rng.integers(2, 37, (ROWS, S)), WIDE_S),
    'targets': (rng.integers(2, 37, (ROWS, T)), WIDE_T),
  }
  batch = {}
  for side, (ids, wide) in sides.items():
    # What stands in padding must not matter either.
    extra = (wide - ids.shape[1]) * padded
    ids = np.pad(ids, ((0, 0), (0, extra)), constant_values=23)
    batch['decoder_inputs' if side == 'targets' else side] = jnp.asarray(ids)
    real = np.arange(ids.shape[1]) < ids.shape[1] - extra
    batch[f'{side}_mask'] = jnp.asarray(np.tile(real, (ROWS, 1)))
  model, _ = small.make(METHOD)
  # Off its start, where every router is nearly even.
  variables = dict(small.variables(METHOD))
  variables['peft'] = jax.tree.map(
    lambda a: a + 0.3 * rng.standard_normal(a.shape, np.float32),
    variables['peft'],
  )
  _, seen = jax.jit(functools.partial(model.apply, mutable=['routing']))(
    variables, batch
  )
  return router_stats.collect(seen['routing'])


def counts():
  """{site: its tokens}: keys and values of cross-attention read the source."""
  actual = {}
  for stack, name in (
    ('encoder', 'self'),
    ('decoder', 'self'),
    ('decoder', 'cross'),
  ):
    own = SOURCE if stack == 'encoder' else TARGET
    read = SOURCE if name == 'cross' else own
    at = f'{stack}/layers/{name}'
    actual |= {f'{at}/q/molora': own, f'{at}/v/molora': read}
    # Each of the three heads is routed by itself.
    actual[f'{at}/k/mov'] = 3 * read
  for stack, tokens in (('encoder', SOURCE), ('decoder', TARGET)):
    at = f'{stack}/layers/mlp'
    actual |= {f'{at}/wo/molora': tokens, f'{at}/act/mov': tokens}
  return actual


@pytest.mark.parametrize('padded', [False, True])
def test_every_site_counts_the_real_tokens_that_it_reads(padded):
  actual = sums(padded)
  assert actual.keys() == counts().keys()
  for site, tokens in counts().items():
    layers = 2 if site.startswith('encoder') else 3
    np.testing.assert_array_equal(
      actual[site].count, [tokens] * layers, err_msg=site
    )


def test_padding_never_moves_a_sum():
  actual, expected = sums(True), sums(False)
  for site in expected:
    for name, value in vars(expected[site]).items():
      if name in ('sparse', 'aux', 'available'):
        continue
      # Activations of other shapes, summed in another order.
      np.testing.assert_allclose(
        vars(actual[site])[name], value, rtol=1e-4, err_msg=f'{site} {name}'
      )


def test_sums_of_a_layer_fit_together():
  for site, one in sums(True).items():
    # Load, weights and probabilities are over all the tokens.
    for value in (one.load, one.share, one.probability):
      np.testing.assert_allclose(
        np.sum(value, axis=-1), one.count, rtol=1e-5, err_msg=site
      )
    assert (one.entropy > 0).all() and (
      one.entropy < one.count * np.log(3)
    ).all()
