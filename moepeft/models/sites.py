# SPDX-License-Identifier: Apache-2.0
"""Adapter sites within a layer, and contexts of batches."""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Batch, Context


def context(batch: Batch, side: str, ids: Array, train: bool) -> Context:
  """The context of the inputs or targets of a batch; no mask: no padding."""
  mask = batch.get(f'{side}_mask')
  segments = batch.get(f'{side}_segments')
  return Context(
    token_mask=jnp.ones(ids.shape, bool) if mask is None else mask,
    prompt_mask=_prompt_mask(batch, ids, segments),
    task_ids=batch.get(f'{side}_tasks'),
    embeddings=batch.get('embeddings'),
    token_ids=ids,
    segment_ids=segments,
    positions=batch.get(f'{side}_positions'),
    train=train,
  )


def _prompt_mask(
  batch: Batch, ids: Array, segments: Array | None
) -> Array | None:
  """The tokens before the first trained target of their segment."""
  if ids is batch['inputs'] and 'decoder_inputs' in batch:
    return batch.get('inputs_mask', jnp.ones(ids.shape, bool))
  trained = batch.get('targets_mask')
  if trained is None:
    return None
  # The number of trained targets before each token.
  count = jnp.cumsum(trained, axis=1) - trained
  if segments is not None:
    begins = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    count -= jax.lax.cummax(jnp.where(begins, count, 0), axis=1)
  return count == 0


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
