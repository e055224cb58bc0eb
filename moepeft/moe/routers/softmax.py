# SPDX-License-Identifier: Apache-2.0
"""The paper's router: every expert, weighted by a softmax (soft merging)."""

import flax.linen as nn

from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class Softmax(LinearGate):
  """weights = softmax(x W); each row sums to one.

  Source: Zadouri et al., arXiv:2309.05444; no bias, float32.
  """

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    return Routing(logits, softmax(noisy))


ROUTER = RouterSpec(Softmax)
