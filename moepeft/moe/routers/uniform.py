# SPDX-License-Identifier: Apache-2.0
"""A baseline: every expert has the same weight; there are no parameters."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS, mask_experts
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class Uniform(nn.Module):
  """weights = 1 / e; each row sums to one. No parameters."""

  experts: int = option(1, EXPERTS)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    shape = (*x.shape[:-1], self.experts)
    logits = mask_experts(jnp.zeros(shape, jnp.float32), ctx)
    if ctx.expert_mask is None:
      weights = jnp.full(shape, 1 / self.experts, jnp.float32)
      return Routing(logits, weights, k=self.experts)
    return Routing(logits, softmax(logits))


ROUTER = RouterSpec(Uniform, learned=False)
