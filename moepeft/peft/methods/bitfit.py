# SPDX-License-Identifier: Apache-2.0
"""BitFit (Ben Zaken et al., arXiv:2106.10199): biases alone are trained."""

import flax.linen as nn

from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import Constant, peft_param
from moepeft.nn.numerics import to_f32
from moepeft.peft.method import Method


class BitFit(nn.Module):
  """y = f(x) + b; the base's function at first.

  It is a change of the base's bias, and a new one where the base has none, as
  in T5.

  Parameters: bias [*out] zeros, float32.
  """

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    del ctx
    y = f(x)
    shape = y.shape[2:]
    bias = peft_param(self, 'bias', Constant(0), shape, f.output_axes)
    return y + bias.astype(y.dtype)


def merge(variables, bias: Array, *, adapter: BitFit, eqn: str) -> Array:
  """The sum of both biases, in float32."""
  del adapter, eqn
  return to_f32(bias) + variables['bias']


_ROLES = ('query', 'key', 'value', 'output', 'gate', 'up', 'down')

METHOD = Method(
  module=BitFit,
  roles={'official': _ROLES, 'paper': _ROLES},
  additive=True,
  merge=merge,
  merges_into='bias',
  scaled_leaves=(),
  exact_identity=True,
)
