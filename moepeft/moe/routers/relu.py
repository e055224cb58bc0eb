# SPDX-License-Identifier: Apache-2.0
"""Experts whose score is positive: ReMoE's router."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate
from moepeft.moe.router import RouterLoss, RouterSpec
from moepeft.moe.router_stats import RouterStats


class Relu(LinearGate):
  """weights = relu(x W): sparse, and continuous where an expert comes in.

  A token with no positive score has no expert, and then no adapter. Source:
  ReMoE (Wang et al., arXiv:2412.14711), its section on ReLU routing. The paper
  moves the weight of `relu_l1` towards a target of sparsity during training;
  here it is constant.
  """

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    weights = jax.nn.relu(noisy)
    total = jnp.sum(weights, axis=-1)
    return Routing(logits, weights, selects=True, aux={'relu_weight': total})


def relu_l1(sums: RouterStats) -> Array:
  """The mean sum of a token's weights. Source: ReMoE's regularisation."""
  return jnp.mean(sums.aux['relu_weight'] / jnp.maximum(sums.count, 1))


ROUTER = RouterSpec(
  Relu,
  normalized=False,
  covers_tokens=False,
  losses={'relu_l1': RouterLoss(relu_l1, ('relu_weight',))},
)
