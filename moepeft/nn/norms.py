# SPDX-License-Identifier: Apache-2.0
"""RMSNorm (arXiv:1910.07467) and LayerNorm, with sites for adapters."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import AdapterMap, BaseLayer, apply_adapters
from moepeft.nn.initializers import Constant, param
from moepeft.nn.numerics import to_f32


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
  """x / rms(x) * scale over the last axis; float32 inside, x's dtype out."""
  y = to_f32(x)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  return (y * to_f32(scale)).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
  """(x - mean) / deviation * scale + bias; float32 inside, x's dtype out."""
  y = to_f32(x)
  y = y - jnp.mean(y, -1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  return (y * to_f32(scale) + to_f32(bias)).astype(x.dtype)


class RMSNorm(nn.Module):
  """`rms_norm` with its scale over the last axis, at a site.

  Attributes:
    offset: added to the stored scale (Gemma stores scale - 1).
    letter: the letter of the axis.
  """

  site: str
  adapter_map: AdapterMap
  eps: float = 1e-6
  param_dtype: Any = jnp.float32
  offset: float = 0.0
  letter: str = 'd'

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    start, shape = Constant(1 - self.offset), x.shape[-1:]
    stored = param(self, 'scale', start, shape, self.letter, self.param_dtype)
    scale = to_f32(stored) + self.offset if self.offset else stored
    features = 'nh' if x.ndim == 4 else self.letter
    f = BaseLayer(
      lambda x: rms_norm(x, scale, self.eps),
      shape=scale.shape,
      input_axes=features,
      output_axes=features,
      kernel=lambda: stored,
      normalize=lambda x: rms_norm(x, jnp.float32(1), self.eps),
    )
    return apply_adapters(self, self.adapter_map, self.site, f, x, ctx)


class LayerNorm(nn.Module):
  """`layer_norm` with its scale and bias [d], at a site."""

  site: str
  adapter_map: AdapterMap
  eps: float = 1e-5
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    shape = x.shape[-1:]
    scale = param(self, 'scale', Constant(1), shape, 'd', self.param_dtype)
    bias = param(self, 'bias', Constant(0), shape, 'd', self.param_dtype)
    f = BaseLayer(
      lambda x: layer_norm(x, scale, bias, self.eps),
      shape=shape,
      input_axes='d',
      output_axes='d',
      kernel=lambda: scale,
      bias=bias,
      normalize=lambda x: layer_norm(
        x, jnp.float32(1), jnp.float32(0), self.eps
      ),
    )
    return apply_adapters(self, self.adapter_map, self.site, f, x, ctx)


@dataclasses.dataclass(frozen=True)
class NormForm:
  """The type and the settings of a model's norms.

  Attributes:
    centred: whether they are `LayerNorm`, not `RMSNorm`.
    offset: see `RMSNorm`.
  """

  eps: float = 1e-6
  centred: bool = False
  offset: float = 0.0

  def at(
    self,
    site: str,
    adapter_map: AdapterMap,
    param_dtype: Any,
    name: str | None = None,
  ) -> nn.Module:
    """The module of the norm at a site; a compact method needs a `name`."""
    if self.centred:
      return LayerNorm(site, adapter_map, self.eps, param_dtype, name=name)
    return RMSNorm(
      site, adapter_map, self.eps, param_dtype, self.offset, name=name
    )
