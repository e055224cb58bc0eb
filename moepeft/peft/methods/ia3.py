# SPDX-License-Identifier: Apache-2.0
"""(IA)^3 (Liu et al., arXiv:2205.05638): one learned scale a feature."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Choices, option
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer, contraction
from moepeft.nn.initializers import Constant, peft_param
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
