# SPDX-License-Identifier: Apache-2.0
"""Sites within a layer, below its path, and their roles."""

import jax.numpy as jnp

from moepeft.core.types import Array, Batch, Context


def context(batch: Batch, side: str, ids: Array, train: bool) -> Context:
  """The context of one side of a batch; without a mask every token is real."""
  mask = batch.get(f'{side}_mask')
  return Context(
    token_mask=jnp.ones(ids.shape, bool) if mask is None else mask,
    segment_ids=batch.get(f'{side}_segments'),
    positions=batch.get(f'{side}_positions'),
    train=train,
  )


ATTENTION = {
  '': 'attention',
  '/norm': 'norm',
  '/q': 'query',
  '/k': 'key',
  '/v': 'value',
  '/core': 'core',
  '/o': 'output',
}


def feed_forward(gated: bool) -> dict[str, str]:
  """The sites of a feed-forward sublayer."""
  gate = {'/wi_0': 'gate', '/wi_1': 'up'} if gated else {'/wi': 'gate'}
  taps = {'/act': 'act', '/hidden': 'hidden', '/wo': 'down'}
  return {'': 'mlp', '/norm': 'norm'} | gate | taps
