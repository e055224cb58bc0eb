# SPDX-License-Identifier: Apache-2.0
"""A random expert in training, the mean of all after it: AdaMix."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import (
  EXPERTS,
  example_ids,
  mask_experts,
  same_in_example,
)
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class RandomThenMean(nn.Module):
  """weights = 1 for a random expert in training; 1 / e after it.

  Source: AdaMix (Wang et al., arXiv:2205.12410), which averages parameters; the
  mean of outputs equals it where experts are linear, or are mixed in their
  parameters. Here each example draws at each site, there each batch, and its
  code draws apart for the projections down and up. The loss that it adds is
  config.loss.consistency. No parameters.
  """

  experts: int = option(1, EXPERTS)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    shape = (*x.shape[:-1], self.experts)
    logits = mask_experts(jnp.zeros(shape, jnp.float32), ctx)
    if not ctx.train:
      return Routing(logits, softmax(logits))
    drawn = jax.random.categorical(self.make_rng('router'), logits)
    drawn = same_in_example(drawn, example_ids(x, ctx))
    return Routing(logits, jax.nn.one_hot(drawn, self.experts), k=1)


ROUTER = RouterSpec(RandomThenMean, learned=False)
