# SPDX-License-Identifier: Apache-2.0
"""Top-1 routing with a capacity: Switch Transformer's router."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate, align, example_ids, top_mask
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class Switch(LinearGate):
  """weights = p for the most probable expert, else 0; p = softmax(x W).

  In training an expert takes the first `capacity` tokens of an example that
  choose it; the others get no adapter, and the load of the load-balance loss
  does not count them.

  Source: Switch Transformer (Fedus et al., arXiv:2101.03961), with the capacity
  of an example, as MixLoRA's 'switch' (arXiv:2404.15159), 32 there, instead of
  a batch. MixLoRA's code multiplies by p in training alone, and so computes
  another function afterwards; here both do.

  Attributes:
    capacity: tokens that an expert takes of an example; 0 for all.
  """

  capacity: int = option(0, Range(0, 1_000_000), training_only=True)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    p = softmax(noisy)
    chosen = top_mask(p, 1)
    if not ctx.train or self.capacity == 0:
      return Routing(logits, jnp.where(chosen, p, 0), k=1)
    chosen &= earlier(chosen, x, ctx) < self.capacity
    return Routing(logits, jnp.where(chosen, p, 0), selects=True)


def earlier(chosen: Array, x: Array, ctx: Context) -> Array:
  """The number of earlier tokens of the example that chose each expert.

  Args:
    chosen: bool [b, t, ..., e].
  """
  chosen &= align(example_ids(x, ctx), chosen) > 0
  count = jnp.cumsum(chosen, axis=1) - chosen
  if ctx.segment_ids is None:
    return count
  segments = ctx.segment_ids
  begins = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
  at_begin = jnp.where(align(begins, count), count, 0)
  return count - jax.lax.cummax(at_begin, axis=1)


ROUTER = RouterSpec(Switch, normalized=False)
