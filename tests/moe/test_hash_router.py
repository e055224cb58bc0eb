# SPDX-License-Identifier: Apache-2.0
"""Token ids choose the experts of the router hash, in models and the engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context
from moepeft.models.decoder import model as decoder
from moepeft.moe import ROUTERS
from moepeft.peft import build
from tests.contracts import answers, small, small_decoders
from tests.reference import router_equations as equations

AT = "targets='*/k|*/wo'"
METHOD = f'molora(experts=7, rank=2, router=hash(k=2), {AT})'


def weights_of(ids, layer, **options):
  router = ROUTERS['hash'].module(**options)
  ctx = Context(token_ids=jnp.asarray(ids), layer=jnp.int32(layer))
  x = jnp.zeros((*np.shape(ids), 1))
  return np.asarray(router.apply({}, x, ctx).combine_weights)


def test_experts_equal_the_hash_in_numpy():
  ids = np.random.default_rng(0).integers(0, 150_000, (2, 5))
  actual = weights_of(ids, layer=4, experts=7, k=3, seed=2**32 - 1)
  for row, place in np.ndindex(ids.shape):
    expected = equations.hash_experts(int(ids[row, place]), 4, 7, 3, 2**32 - 1)
    np.testing.assert_allclose(actual[row, place], expected, rtol=1e-6)


def test_experts_have_equal_shares_of_the_vocabulary_in_every_layer():
  ids = np.arange(8_000)[None]
  first, second = (weights_of(ids, layer, experts=5)[0] for layer in (0, 1))
  # Binomial(8000, 1/5): 1600 with a deviation of 36; within four.
  assert np.abs(first.sum(0) - 1_600).max() < 144
  # Of pairs of layers a fifth agree.
  assert np.abs((first * second).sum() - 1_600) < 144


def sown(batch, model, variables):
  sites = jax.jit(
    lambda variables: model.apply(variables, batch, mutable=['weights'])[1]
  )(variables)['weights']
  return {
    (side, part, site): np.asarray(site_weights['molora']['weights'][0])
    for side in sites
    for part, by_site in sites[side]['layers'].items()
    for site, site_weights in by_site.items()
  }


def test_a_model_s_sites_have_the_ids_of_their_tokens():
  model, _ = small.make(METHOD)
  batch = small.batch()
  weights = sown(batch, model, small.variables(METHOD))
  reads = {'encoder': 'inputs', 'decoder': 'decoder_inputs'}
  for (side, part, _), by_layer in weights.items():
    # Cross-attention has keys of the encoder's tokens.
    ids = batch['inputs' if part == 'cross' else reads[side]]
    for layer, row in ((0, 1), (len(by_layer) - 1, 2)):
      expected = [
        equations.hash_experts(int(token), layer, 7, 2, 0) for token in ids[row]
      ]
      np.testing.assert_allclose(by_layer[layer, row], expected, rtol=1e-6)


def served_as_trained(model, variables, prompts):
  """Compares the best tokens' log-probabilities of cached steps."""
  given = answers.engine_answers(model, variables, prompts, 3, logprobs=5)
  for prompt, answer in zip(prompts, given, strict=True):
    logits = answers.uncached_logits(model, variables, prompt, answer.ids)
    expected = np.asarray(jax.nn.log_softmax(logits))
    for token, row in zip(answer.tokens, expected[:-1], strict=True):
      ids, logprobs = map(list, zip(*token.top, strict=True))
      # float32 sums in another order over five layers.
      np.testing.assert_allclose(logprobs, row[ids], atol=2e-4)


def test_an_encoder_decoder_is_served_with_the_ids_of_both():
  model, _ = small.make(METHOD)
  variables = small.variables(METHOD, noise=0.3)
  served_as_trained(model, variables, answers.real_rows(small.batch())[:1])


@pytest.mark.slow
def test_a_decoder_is_served_with_its_ids():
  config = small_decoders.CONFIGS['llama']
  built = build(METHOD, decoder.sites(config))
  model = decoder.Decoder(config, built.adapter_map)
  batch = {'inputs': jnp.zeros((1, 2), jnp.int32)}
  variables = jax.jit(model.init)(small.RNGS, batch)
  peft = small.moved(variables['peft'], 0.3, 2)
  variables = {'params': variables['params'], 'peft': peft}
  served_as_trained(model, variables, [[5, 6, 7, 8, 9], [12, 13]])


def test_a_head_has_no_ids():
  sites = decoder.sites(small_decoders.CONFIGS['llama'])
  with pytest.raises(ValueError, match='which the head does not have'):
    build("molora(router=hash, targets='head')", sites)
  with pytest.raises(ValueError, match='does not have; name sites'):
    ROUTERS['hash'].module(experts=2).apply({}, jnp.ones((1, 2, 3)), Context())
