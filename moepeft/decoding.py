# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of encoder-decoders with a cache, in one compiled loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moepeft.models.context import context
from moepeft.typing import Array, Batch, Context, Tree

PAD, EOS = 0, 1


@functools.partial(jax.jit, static_argnums=(0, 3), static_argnames=('eos',))
def greedy(
  model: Any, variables: Tree, batch: Batch, length: int, eos: int = EOS
) -> Array:
  """The most probable continuation, token by token: int32 [b, length].

  Rows end with `eos`, then padding; a row that never ends is cut. The loop
  stops where every row has ended.

  Args:
    batch: inputs [b, s] and, optionally, inputs_mask.
    length: tokens to generate at most; also the cache's length.
  """
  source_ctx = context(batch, 'inputs', batch['inputs'], train=False)
  encoded = model.apply(variables, batch['inputs'], source_ctx, method='encode')
  rows = batch['inputs'].shape[0]

  def step(variables, ids, index):
    ctx = Context(
      token_mask=jnp.ones((rows, 1), bool),
      index=index,
      decode=True,
      cache_length=length,
    )
    logits, changed = model.apply(
      variables,
      ids[:, None],
      ctx,
      encoded,
      source_ctx,
      method='decode',
      mutable=['cache'],
    )
    return jnp.argmax(logits[:, 0], axis=-1), changed['cache']

  # The first step makes the cache, so it stands before the loop.
  first, cache = step(variables, jnp.full(rows, PAD, jnp.int32), jnp.int32(0))
  first = first.astype(jnp.int32)
  tokens = jnp.full((rows, length), PAD, jnp.int32).at[:, 0].set(first)

  def unfinished(carry):
    index, _, done, _ = carry
    return (index < length) & ~jnp.all(done)

  def body(carry):
    index, tokens, done, cache = carry
    token = tokens[:, index - 1]
    following, cache = step({**variables, 'cache': cache}, token, index)
    following = jnp.where(done, PAD, following).astype(jnp.int32)
    tokens = tokens.at[:, index].set(following)
    return index + 1, tokens, done | (following == eos), cache

  carry = jnp.int32(1), tokens, first == eos, cache
  return jax.lax.while_loop(unfinished, body, carry)[1]
