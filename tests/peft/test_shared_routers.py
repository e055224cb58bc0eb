# SPDX-License-Identifier: Apache-2.0
"""Sites of a layer that read the same input can share one router."""

import jax
import numpy as np
import pytest

from moepeft.models import weight_mapping
from moepeft.models.t5 import model as t5
from moepeft.peft import build

from ..contracts import answers, small

AT = "targets='*/q|*/k|*/v|*/wi_0|*/wo'"
SHARED = f'molora(experts=3, rank=2, share_router=True, {AT})'
APART = f'molora(experts=3, rank=2, {AT})'
KERNEL = 'molora/router/kernel'


def flat(method, **options):
  return weight_mapping.flatten(small.variables(method, **options)['peft'])


def test_the_first_site_that_reads_an_input_has_its_router():
  # The cross-attention's q reads the decoder, its k and v the encoder.
  routers = {
    path.removesuffix(f'/{KERNEL}').replace('/layers', '')
    for path in flat(SHARED)
    if path.endswith(KERNEL)
  }
  assert routers == {
    *('encoder/self/q', 'encoder/mlp/wi_0', 'encoder/mlp/wo'),
    *('decoder/self/q', 'decoder/cross/q', 'decoder/cross/k'),
    *('decoder/mlp/wi_0', 'decoder/mlp/wo'),
  }


def copied():
  """The shared routers at every site, as those that are apart."""
  shared, owner = flat(SHARED, noise=0.3), {}
  arrays = dict(shared)
  for path in flat(APART):
    if path in shared:
      continue
    site = path.removesuffix(f'/{KERNEL}')
    block, _, name = site.rpartition('/')
    owner = 'k' if name == 'v' and block.endswith('cross') else 'q'
    arrays[path] = shared[f'{block}/{owner}/{KERNEL}']
  return arrays


def test_shared_routers_compute_what_equal_routers_compute():
  params = small.params()
  apart, _ = small.make(APART)
  shared, _ = small.make(SHARED)
  np.testing.assert_array_equal(
    small.jitted(shared)(small.variables(SHARED, noise=0.3), small.batch()),
    small.jitted(apart)(
      {'params': params, 'peft': weight_mapping.unflatten(copied())},
      small.batch(),
    ),
  )


def test_a_shared_routing_is_made_and_counted_once():
  model, _ = small.make(SHARED)
  sown = jax.eval_shape(
    lambda variables: model.apply(
      variables, small.batch(), mutable=['routing', 'weights']
    )[1],
    small.variables(SHARED, noise=0.3),
  )
  for kind in ('routing', 'weights'):
    layers = {side: sown[kind][side]['layers'] for side in sown[kind]}
    assert set(layers['encoder']['self']) == {'q'}
    assert set(layers['decoder']['cross']) == {'q', 'k'}


@pytest.mark.slow
@pytest.mark.parametrize('method', [SHARED, 'moa(rank=2, size=3)'])
def test_shared_routers_generate_what_they_score(method):
  # The cross-attention's k and v, one of them with the router, are cached.
  model, _ = small.make(method)
  variables = small.variables(method, noise=0.3)
  (answer,) = answers.engine_answers(
    model, variables, answers.real_rows(small.batch())[:1], 3, logprobs=5
  )
  prompt = answers.real_rows(small.batch())[0]
  logits = answers.uncached_logits(model, variables, prompt, answer.ids)
  expected = np.asarray(jax.nn.log_softmax(logits))
  for token, row in zip(answer.tokens, expected[:-1], strict=True):
    ids, logprobs = map(list, zip(*token.top, strict=True))
    # float32 sums in another order over five layers.
    np.testing.assert_allclose(logprobs, row[ids], atol=2e-4)


def test_routers_are_shared_only_where_sites_read_the_same():
  sites = t5.sites(small.GATED)
  for reads in ('output', 'down'):
    with pytest.raises(ValueError, match="write reads='input'"):
      build(f'molora(share_router=True, reads={reads})', sites)
  with pytest.raises(ValueError, match='where they read the same input'):
    build('mov(share_router=True)', sites)
