# SPDX-License-Identifier: Apache-2.0
"""DoRA (Liu et al., arXiv:2402.09353): LoRA on a weight's direction, and a
learned magnitude for each of its outputs."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moepeft.core.ranges import Choices, option
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer, contraction, kernel_letters
from moepeft.nn.initializers import Constant, peft_param
from moepeft.nn.numerics import to_f32
from moepeft.peft import low_rank
from moepeft.peft.method import Method
from moepeft.peft.methods import lora
from moepeft.peft.methods.lora import Lora


class Dora(Lora):
  """y = m / |W + s A B| * (f(x) + s x A B), the bias left alone.

  |.| is the norm over the kernel's inputs, one of each output, and a constant
  to the gradient (the paper's section 4.3). m starts as |W|, so the model is
  the base's at first; where |W| is zero, m is held to be it. Dropout is of
  the term's input alone (Hugging Face's peft lets it also into the base's
  share of what m changes).

  Parameters: a and b as in LoRA; magnitude [*out], float32. Options as in
  LoRA.
  """

  init_weights: str = option('zero', Choices(('zero',)))
  # No paper defines a mixture of them.
  mix = None

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    inside, outside = low_rank.shapes(f, 'dora')
    shape_a, shape_b = (*inside, self.rank), (self.rank, *outside)
    init_a = self.init_a(inside)
    a = peft_param(self, 'a', init_a, shape_a, f'{f.input_axes}r')
    b = peft_param(self, 'b', lora.INIT_B, shape_b, f'r{f.output_axes}')
    kernel = to_f32(f.kernel())
    magnitude = peft_param(
      self, 'magnitude', lambda *_: norm(kernel, f.eqn), outside, f.output_axes
    )
    changed = kernel + self.scale * low_rank.product(a, b, f.eqn)
    size = jax.lax.stop_gradient(norm(changed, f.eqn))
    y = f(x)
    drop = nn.Dropout(self.dropout)
    x = drop(x, deterministic=not ctx.train).astype(y.dtype)
    term = low_rank.up(low_rank.down(x, a) * self.scale, b)
    ratio = share(magnitude, size).astype(y.dtype)
    y = ratio * (y + term)
    return y if f.bias is None else y + (1 - ratio) * f.bias.astype(y.dtype)


def norm(kernel: Array, eqn: str) -> Array:
  """The norm over a kernel's inputs: [*in, *out] -> [*out]."""
  _, inner, _, _ = contraction(eqn)
  axes = tuple(kernel_letters(eqn).index(letter) for letter in inner)
  return jnp.sqrt(jnp.sum(kernel * kernel, axis=axes))


def share(magnitude: Array, size: Array) -> Array:
  """magnitude / size; a weight of the size zero has no direction to scale."""
  return magnitude / jnp.where(size > 0, size, 1)


def merge(variables, kernel: Array, *, adapter: Dora, eqn: str) -> Array:
  """m / |W + s A B| * (W + s A B), in float32."""
  changed = lora.merge(variables, kernel, adapter=adapter, eqn=eqn)
  ratio = share(variables['magnitude'], norm(changed, eqn))
  _, _, outer, _ = contraction(eqn)
  letters = kernel_letters(eqn)
  return jnp.einsum(f'{letters},{outer}->{letters}', changed, ratio)


class ServedDora(nn.Module):
  """DoRA with its ratio m / |W + A B| as an array: f(x) stays as cheap as in
  LoRA. Made anew from the weight, it would build every row's own W + A B.

  Parameters: a, b as in LoRA of the scale one; ratio [*out], ones at first.
  """

  rank: int

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    inside, outside = low_rank.shapes(f, 'dora')
    shape_a, shape_b = (*inside, self.rank), (self.rank, *outside)
    a = peft_param(self, 'a', lora.INIT_A, shape_a, f'{f.input_axes}r')
    b = peft_param(self, 'b', lora.INIT_B, shape_b, f'r{f.output_axes}')
    ratio = peft_param(self, 'ratio', Constant(1), outside, f.output_axes)
    y = f(x)
    ratio = ratio.astype(y.dtype)
    term = low_rank.up(low_rank.down(x.astype(y.dtype), a), b)
    y = ratio * (y + term)
    return y if f.bias is None else y + (1 - ratio) * f.bias.astype(y.dtype)


def pooled_module(adapter: Dora, name: str) -> ServedDora:
  return ServedDora(adapter.rank, name=name, parent=None)


def pooled_ratio(arrays, kernel: Callable, scale: float) -> np.ndarray:
  """m / |W + s A B| [*out] of one layer, on the host.

  Args:
    arrays: a, b and magnitude of the layer.
    kernel: (inputs, outputs) -> W, float32 of that shape.
  """
  a, b, magnitude = arrays['a'], arrays['b'], arrays['magnitude']
  term = a.reshape(-1, a.shape[-1]) @ b.reshape(len(b), -1)
  changed = kernel(term.shape) + np.float32(scale) * term
  size = np.linalg.norm(changed, axis=0).reshape(magnitude.shape)
  return magnitude / np.where(size > 0, size, 1)


METHOD = Method(
  module=Dora,
  roles=lora.METHOD.roles,
  merge=merge,
  innermost=True,
  size_option='rank',
  pooled_module=pooled_module,
  pooled_leaves={'ratio': pooled_ratio},
)
