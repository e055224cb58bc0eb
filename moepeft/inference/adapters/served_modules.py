# SPDX-License-Identifier: Apache-2.0
"""Modules that stand in a bank for those that were trained.

They compute the same, from arrays alone: what a trained module takes from its
path or works out anew from the base's weights is worked out once, in loading.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import gate_logits, top_mask
from moepeft.moe.routers.random import Random
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import Constant, peft_param
from moepeft.peft.methods import lora
from moepeft.peft.methods.dora import Dora
from moepeft.peft.methods.ia3 import Ia3
from moepeft.peft.methods.lora import Lora
from moepeft.peft.methods.molora import MoLora

# Of zeros (a scale of ones), these give f(x) bit for bit.
_EXACT = (Lora, Ia3, MoLora)


class SwitchedAdapter(nn.Module):
  """y = adapter(f, x) where `on`, else f(x) bit for bit.

  For adapters that no values make exactly the base: a mixture of vectors
  whose weights sum to one only nearly, or to less. f(x) is computed once.

  Parameters: on [], 0 or 1, beside the adapter's own, under its name.
  """

  adapter: nn.Module

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    nn.share_scope(self, self.adapter)
    on = peft_param(self, 'on', Constant(0), (), '')
    y = f(x)
    once = dataclasses.replace(f, call=lambda z: y if z is x else f(z))
    return jnp.where(on > 0, self.adapter(once, x, ctx), y)


class ServedDora(nn.Module):
  """DoRA with its ratio m / |W + A B| as an array: f(x) stays as cheap as in
  LoRA. Made anew from the weight, it would build every row's own W + A B.

  Parameters: a, b as in LoRA of the scale one; ratio [*out], ones at first.
  """

  rank: int

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    inside, outside = lora.shapes(f, 'dora')
    shape_a, shape_b = (*inside, self.rank), (self.rank, *outside)
    a = peft_param(self, 'a', lora.INIT_A, shape_a, f'{f.input_axes}r')
    b = peft_param(self, 'b', lora.INIT_B, shape_b, f'r{f.output_axes}')
    ratio = peft_param(self, 'ratio', Constant(1), outside, f.output_axes)
    y = f(x)
    ratio = ratio.astype(y.dtype)
    term = lora.up(lora.down(x.astype(y.dtype), a), b)
    y = ratio * (y + term)
    return y if f.bias is None else y + (1 - ratio) * f.bias.astype(y.dtype)


class FixedProjectionRouter(nn.Module):
  """`random` with its projection as an array: a name is not data, and the
  projection that a router draws depends on its adapter's name.

  Parameters: kernel [i, e].
  """

  experts: int = 1
  k: int = 1

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    shape = (x.shape[-1], self.experts)
    kernel = peft_param(self, 'kernel', Constant(0), shape, 'ie')
    logits = gate_logits(x, kernel)
    weights = top_mask(logits, self.k).astype(jnp.float32) / self.k
    return Routing(logits, weights, k=self.k)


def served_module(adapter: nn.Module, name: str) -> nn.Module:
  """What stands for a trained module, under another name."""
  router = getattr(adapter, 'router', None)
  if isinstance(router, Random):
    router = FixedProjectionRouter(router.experts, router.k, parent=None)
    adapter = adapter.clone(router=router, parent=None)
  if isinstance(adapter, Dora):
    return ServedDora(adapter.rank, name=name, parent=None)
  if type(adapter) in _EXACT:
    return adapter.clone(name=name, parent=None)
  # Its scope is the wrapper's.
  inside = adapter.clone(name=None, parent=None)
  return SwitchedAdapter(inside, name=name, parent=None)
