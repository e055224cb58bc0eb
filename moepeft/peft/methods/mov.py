# SPDX-License-Identifier: Apache-2.0
"""MoV (Zadouri et al., arXiv:2309.05444): a routed mixture of (IA)^3."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Choices, option
from moepeft.core.types import Array, Context
from moepeft.moe.gate import EXPERTS
from moepeft.moe.router_stats import route
from moepeft.moe.routers.softmax import Softmax
from moepeft.nn.adapter_hook import BaseLayer, flatten_features
from moepeft.nn.initializers import peft_param
from moepeft.nn.low_rank_matmul import low_rank_matmul
from moepeft.nn.numerics import to_f32
from moepeft.peft.method import Method
from moepeft.peft.methods.ia3 import INIT_SCALE

READS = ('heads', 'output', 'input')


class MoV(nn.Module):
  """y = f(x) * sum_e p_e l_e; the base's function at first if p sums to one.

  Parameters: scale [e, *out] ones, and the router's; float32 throughout, as
  in the released code.

  Attributes:
    experts: e.
    router: the router module.
    reads: what the router sees. 'heads' (official): each head of a projected
      key or value, through one kernel [h, e] that the heads share; 'output':
      the whole of f(x) (paper); 'input': x. Where f(x) has no heads, 'heads'
      is 'output'.
  """

  experts: int = option(10, EXPERTS)
  router: nn.Module = Softmax(10)
  reads: str = option('heads', Choices(READS))

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    y = f(x)
    shape = (self.experts, *y.shape[2:])
    scale = peft_param(self, 'scale', INIT_SCALE, shape, f'e{f.output_axes}')
    if self.reads == 'heads' and y.ndim == 4:
      p = route(self, self.router, y, ctx).combine_weights
      mixed = jnp.einsum('btne,enh->btnh', p, scale)
    else:
      router_input = flatten_features(x if self.reads == 'input' else y)
      p = route(self, self.router, router_input, ctx).combine_weights
      flat = scale.reshape(self.experts, -1)
      mixed = low_rank_matmul(p, flat).reshape(y.shape)
    return (to_f32(y) * mixed).astype(y.dtype)


_ROLES = ('key', 'value', 'act')

METHOD = Method(
  module=MoV,
  roles={'official': _ROLES, 'paper': _ROLES},
  defaults={'official': {'reads': 'heads'}, 'paper': {'reads': 'output'}},
  why_not='its experts are weighted anew for every token',
)
