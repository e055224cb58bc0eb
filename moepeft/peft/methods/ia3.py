# SPDX-License-Identifier: Apache-2.0
"""(IA)^3 (Liu et al., arXiv:2205.05638): one learned scale a feature."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Choices, option
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer, contraction
from moepeft.nn.initializers import Constant, peft_param
from moepeft.nn.low_rank_matmul import low_rank_matmul
from moepeft.nn.numerics import to_f32
from moepeft.peft.method import Method

INIT_SCALE = Constant(1)


class Ia3(nn.Module):
  """y = f(x) * l on outputs, f(x * l) on inputs; l is ones at first.

  Parameters: scale [*out] or [*in], float32.

  Attributes:
    on: 'output' or 'input'.
  """

  on: str = option('output', Choices(('output', 'input')))

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    if self.on == 'input':
      scale = peft_param(self, 'scale', INIT_SCALE, x.shape[2:], f.input_axes)
      return f(x * scale.astype(x.dtype))
    y = f(x)
    scale = peft_param(self, 'scale', INIT_SCALE, y.shape[2:], f.output_axes)
    return y * scale.astype(y.dtype)

  @nn.nowrap
  def mix(
    self, module: nn.Module, f: BaseLayer, x: Array, ctx: Context, mixing: Any
  ) -> Array:
    """f(x) * sum_e p_e l_e, or f(x * sum_e p_e l_e).

    float32 throughout, as in the released code. The base's function at first
    where the weights sum to one.

    Parameters: scale [e, *out] or [e, *in] ones.
    """
    del ctx
    on_input = self.on == 'input'
    scaled, axes = (x, f.input_axes) if on_input else (f(x), f.output_axes)
    shape = (mixing.experts, *scaled.shape[2:])
    scale = peft_param(module, 'scale', INIT_SCALE, shape, f'e{axes}')
    weights = mixing.weights()
    if weights.ndim == 4:
      # Heads first, the order in which XLA multiplies them.
      b, t, n, e = weights.shape
      by_head = weights.transpose(2, 0, 1, 3).reshape(n, b * t, e)
      mixed = jnp.matmul(by_head, scale.swapaxes(0, 1))
      mixed = mixed.reshape(n, b, t, -1).transpose(1, 2, 0, 3)
    else:
      flat = scale.reshape(len(scale), -1)
      mixed = low_rank_matmul(weights, flat).reshape(scaled.shape)
    scaled = (to_f32(scaled) * mixed).astype(scaled.dtype)
    return f(scaled) if on_input else scaled


def merge(variables, kernel: Array, *, adapter: Ia3, eqn: str) -> Array:
  """The kernel with its outputs (or inputs) scaled, in float32."""
  _, inner, outer, _ = contraction(eqn)
  letters = eqn.split('->')[0].split(',')[1]
  side = outer if adapter.on == 'output' else inner
  return jnp.einsum(
    f'{letters},{side}->{letters}',
    to_f32(kernel),
    variables['scale'],
  )


def merge_bias(variables, bias: Array, *, adapter: Ia3) -> Array:
  """Outputs are scaled with their bias; scaled inputs leave it alone."""
  if adapter.on == 'input':
    return bias
  return to_f32(bias) * variables['scale']


_ROLES = ('key', 'value', 'act')

METHOD = Method(
  module=Ia3,
  roles={'official': _ROLES, 'paper': _ROLES},
  merge=merge,
  merge_bias=merge_bias,
  exact_identity=True,
)
