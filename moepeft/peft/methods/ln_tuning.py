# SPDX-License-Identifier: Apache-2.0
"""LN tuning: the scales and biases of norms are trained.

Zhao et al., arXiv:2312.11420, as `LNTuningConfig` of peft has it.
"""

import flax.linen as nn

from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import peft_param
from moepeft.nn.numerics import to_f32
from moepeft.peft.method import Method


class LnTuning(nn.Module):
  """A norm with a scale and a bias of its own, the base's at first.

  y = f(x) + n(x) (scale' - scale) + bias' - bias, where f(x) is
  n(x) scale + bias.

  Parameters: scale [d], and bias [d] of a LayerNorm, float32; as stored, so
  without Gemma's 1.
  """

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    del ctx
    if f.normalize is None:
      raise ValueError(
        f'{self.name} acts at norms only (like */norm); leave out `targets`'
      )
    y = f(x)
    axes = f.output_axes[-1:]
    base = to_f32(f.kernel())
    scale = peft_param(self, 'scale', lambda *_: base, f.shape, axes)
    y = y + f.normalize(x) * (scale - base).astype(y.dtype)
    if f.bias is None:
      return y
    base_bias = to_f32(f.bias)
    bias = peft_param(self, 'bias', lambda *_: base_bias, f.shape, axes)
    return y + (bias - base_bias).astype(y.dtype)


def merge(variables, scale: Array, *, adapter: LnTuning, eqn: str) -> Array:
  del scale, adapter, eqn
  return variables['scale']


def merge_bias(variables, bias: Array, *, adapter: LnTuning) -> Array:
  del bias, adapter
  return variables['bias']


METHOD = Method(
  module=LnTuning,
  roles={'official': ('norm',), 'paper': ('norm',)},
  merge=merge,
  merge_bias=merge_bias,
  merges_into='scale',
  scaled_leaves=(),
)
