# SPDX-License-Identifier: Apache-2.0
"""A small encoder of odd sizes, with all that one may have."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.models.bert.model import Bert, BertConfig, sites
from moepeft.nn.initializers import init_params
from moepeft.peft import build

# Primes but for the width, which heads of 7 share.
WHOLE = BertConfig(
  vocab=37,
  d_model=21,
  heads=3,
  ffn=17,
  layers=2,
  length=19,
  types=5,
  pooler=True,
  masked=True,
  tied=True,
  dropout=0.0,
)
UNTIED = dataclasses.replace(WHOLE, tied=False, activation='relu')
BARE = dataclasses.replace(WHOLE, pooler=False, masked=False)
LENGTHS = (11, 4, 7)


def batch(vocab=37, seed=0):
  """Rows of three lengths, padded at their ends, of several token types."""
  rng = np.random.default_rng(seed)
  mask = np.arange(11)[None] < np.array(LENGTHS)[:, None]
  return {
    'inputs': jnp.asarray(rng.integers(2, vocab, mask.shape) * mask),
    'inputs_mask': jnp.asarray(mask),
    'inputs_types': jnp.asarray(rng.integers(0, 5, mask.shape)),
  }


def make(config, method='full', noise=0.0, **options):
  """(model, variables); `noise` moves adapters off where they start."""
  advice = build(method, sites(config)).adapter_map
  model = Bert(config, advice, **options)
  return model, _variables(config, method, noise)


@functools.cache
def _variables(config, method, noise):
  """Weights so large that all of them matter; biases and scales too."""
  model = Bert(config, build(method, sites(config)).adapter_map)
  rng = np.random.default_rng(1)

  def move(by):
    return lambda leaf: np.float32(leaf + by * rng.normal(size=leaf.shape))

  params = jax.tree.map(move(0.2), init_params(model, batch(), 3)['params'])
  # After it: some adapters start from the base's weights.
  peft = init_params(model, batch(), 3, params)['peft']
  return {'params': params, 'peft': jax.tree.map(move(noise), peft)}
