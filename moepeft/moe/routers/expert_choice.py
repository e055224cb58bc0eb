# SPDX-License-Identifier: Apache-2.0
"""Experts that choose their tokens: expert choice."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate, align, example_ids
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class ExpertChoice(LinearGate):
  """weights = p where an expert chose the token, else 0; p = softmax(x W).

  Of each example an expert chooses the ceil(capacity_factor * tokens / e) with
  the largest p, so that all loads are even. What comes later decides too: only
  encoders may use it. Source: Zhou et al., arXiv:2202.09368, whose experts
  choose among the tokens of a batch.

  Attributes:
    capacity_factor: experts a token on average; 2 is the paper's.
  """

  capacity_factor: float = option(2.0, Range(0, 65_536, above=True))

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    p = softmax(noisy)
    experts = jnp.sum(jnp.isfinite(logits), axis=-1, keepdims=True)
    rank, tokens = ranks(jax.lax.stop_gradient(p), example_ids(x, ctx))
    # A float32 product may be slightly above an integer.
    capacity = jnp.ceil(self.capacity_factor * tokens / experts - 1e-4)
    return Routing(logits, jnp.where(rank < capacity, p, 0), selects=True)


def ranks(p: Array, ids: Array) -> tuple[Array, Array]:
  """(tokens of the example with a larger p, all of its tokens), int.

  Args:
    p: [b, t, ..., e]; among equals the first is the largest.
    ids: from `example_ids`.
  """
  ordered = jnp.sort(ids, axis=1)
  first = jax.vmap(jnp.searchsorted)(ordered, ids)
  end = jax.vmap(lambda a, v: jnp.searchsorted(a, v, side='right'))(
    ordered, ids
  )
  by_example = jnp.lexsort((-p, jnp.broadcast_to(align(ids, p), p.shape)), 1)
  place = jnp.argsort(by_example, axis=1)
  return place - align(first, p), align(end - first, p)


ROUTER = RouterSpec(ExpertChoice, normalized=False, causal=False)
