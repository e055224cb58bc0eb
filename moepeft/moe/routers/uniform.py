# SPDX-License-Identifier: Apache-2.0
"""A control: every expert with the same weight; nothing to learn."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS
from moepeft.moe.router import RouterSpec


class Uniform(nn.Module):
  """weights = 1 / e; each row sums to one. No parameters."""

  experts: int = option(1, EXPERTS)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    shape = (*x.shape[:-1], self.experts)
    weights = jnp.full(shape, 1 / self.experts, jnp.float32)
    return Routing(jnp.zeros(shape, jnp.float32), weights, k=self.experts)


ROUTER = RouterSpec(Uniform, learned=False)
