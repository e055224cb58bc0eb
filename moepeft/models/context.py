# SPDX-License-Identifier: Apache-2.0
"""From a batch's arrays to the context that advice reads."""

import jax.numpy as jnp

from moepeft.core.types import Array, Batch, Context


def context(batch: Batch, side: str, ids: Array, train: bool) -> Context:
  """The context of one side of a batch; every token real where unsaid."""
  mask = batch.get(f'{side}_mask')
  return Context(
    token_mask=jnp.ones(ids.shape, bool) if mask is None else mask,
    segment_ids=batch.get(f'{side}_segments'),
    positions=batch.get(f'{side}_positions'),
    train=train,
  )
