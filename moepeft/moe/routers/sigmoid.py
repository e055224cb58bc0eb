# SPDX-License-Identifier: Apache-2.0
"""A gate for each expert by itself: the experts do not compete."""

import flax.linen as nn
import jax

from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate
from moepeft.moe.router import RouterSpec


class Sigmoid(LinearGate):
  """weights = sigmoid(x W), each between 0 and 1; they sum to anything.

  Source: the gates of the soft mixture of heterogeneous adapters (MoA,
  arXiv:2506.05928).
  """

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    return Routing(logits, jax.nn.sigmoid(noisy))


ROUTER = RouterSpec(Sigmoid, normalized=False)
