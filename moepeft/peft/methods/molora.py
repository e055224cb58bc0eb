# SPDX-License-Identifier: Apache-2.0
"""MoLoRA (Zadouri et al., arXiv:2309.05444): a routed mixture of LoRAs."""

import flax.linen as nn

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context
from moepeft.moe.gate import EXPERTS
from moepeft.moe.router_stats import route
from moepeft.moe.routers.softmax import Softmax
from moepeft.nn.adapter_hook import BaseLayer, flatten_features
from moepeft.nn.initializers import peft_param
from moepeft.peft.method import Method
from moepeft.peft.methods import lora


class MoLora(nn.Module):
  """y = f(x) + alpha / r sum_e p_e (x A_e) B_e.

  The gate acts in rank space: p weights x A, and (e, r) is contracted with B
  in one product. It equals mixing the experts' outputs, as the released code
  does, and never builds [b, t, e, out].

  Parameters: a [*in, e, r] ~ N(0, 0.02^2), b [e, r, *out] zeros, and the
  router's, which reads the projection's whole input.

  Attributes:
    experts: e; rank: r of each; alpha, dropout: as in LoRA.
    router: the router module.
  """

  experts: int = option(10, EXPERTS)
  rank: int = option(4, lora.RANK)
  alpha: float = option(16.0, lora.ALPHA)
  dropout: float = option(0.0, lora.DROPOUT, training_only=True)
  router: nn.Module = Softmax(10)

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    inside, outside = lora.shapes(f, 'molora')
    ranks = (self.experts, self.rank)
    a = peft_param(
      self, 'a', lora.INIT_A, (*inside, *ranks), f'{f.input_axes}er'
    )
    b = peft_param(
      self, 'b', lora.INIT_B, (*ranks, *outside), f'er{f.output_axes}'
    )
    p = route(self, self.router, flatten_features(x), ctx).combine_weights
    y = f(x)
    drop = nn.Dropout(self.dropout)
    x = drop(x, deterministic=not ctx.train).astype(y.dtype)
    z = lora.down(x, a)
    z = z * (p * (self.alpha / self.rank))[..., None].astype(y.dtype)
    return y + lora.up(z, b)


METHOD = Method(
  module=MoLora,
  roles=lora.METHOD.roles,
  why_not='its experts are weighted anew for every token',
  size_option='rank',
  exact_identity=True,
)
