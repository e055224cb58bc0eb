# SPDX-License-Identifier: Apache-2.0
"""A softmax router whose kernel is a product of two thin ones."""

import flax.linen as nn

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate, gate_logits
from moepeft.moe.router import RouterSpec
from moepeft.nn.initializers import kaiming_uniform, peft_param
from moepeft.nn.numerics import softmax


class LowRank(LinearGate):
  """weights = softmax(x U V): r (i + e) parameters instead of i e.

  As the low-rank router of scalable-moe-lora (github.com/attrung), which takes
  the softmax over k experts.

  Parameters: kernel, U [i, r]; up_kernel, V [r, e], drawn as by
  torch.nn.Linear.

  Attributes:
    rank: r.
  """

  rank: int = option(8, Range(1, 65_536))

  @nn.nowrap
  def scores(self, x: Array) -> Array:
    down = self.input_kernel(x, self.rank, 'ir')
    shape = (self.rank, self.experts)
    up = peft_param(self, 'up_kernel', kaiming_uniform(self.rank), shape, 're')
    return gate_logits(gate_logits(x, down), up)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    return Routing(logits, softmax(noisy))


ROUTER = RouterSpec(LowRank)
