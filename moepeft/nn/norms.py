# SPDX-License-Identifier: Apache-2.0
"""Layer norms: by the root mean square (arXiv:1910.07467) or the deviation."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import Advice, Frozen, advise
from moepeft.nn.initializers import Fill, param
from moepeft.nn.numerics import wide


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
  """x / rms(x) * scale over the last axis; float32 inside, x's dtype out."""
  y = wide(x)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  return (y * wide(scale)).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
  """(x - mean) / deviation * scale + bias; float32 inside, x's dtype out."""
  y = wide(x)
  y = y - jnp.mean(y, -1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  return (y * wide(scale) + wide(bias)).astype(x.dtype)


class RMSNorm(nn.Module):
  """`rms_norm` with its scale over the last axis, at a site.

  Attributes:
    offset: added to the stored scale (Gemma stores scale - 1).
    letter: of the axis.
  """

  site: str
  advice: Advice
  eps: float = 1e-6
  param_dtype: Any = jnp.float32
  offset: float = 0.0
  letter: str = 'd'

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    start, shape = Fill(1 - self.offset), x.shape[-1:]
    scale = param(self, 'scale', start, shape, self.letter, self.param_dtype)
    if self.offset:
      scale = wide(scale) + self.offset
    features = 'nh' if x.ndim == 4 else self.letter
    f = Frozen(
      lambda x: rms_norm(x, scale, self.eps),
      shape=scale.shape,
      inside=features,
      outside=features,
      kernel=lambda: scale,
    )
    return advise(self, self.advice, self.site, f, x, ctx)


class LayerNorm(nn.Module):
  """`layer_norm` with its scale and bias [d], at a site."""

  site: str
  advice: Advice
  eps: float = 1e-5
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    shape = x.shape[-1:]
    scale = param(self, 'scale', Fill(1), shape, 'd', self.param_dtype)
    bias = param(self, 'bias', Fill(0), shape, 'd', self.param_dtype)
    f = Frozen(
      lambda x: layer_norm(x, scale, bias, self.eps),
      shape=shape,
      inside='d',
      outside='d',
      kernel=lambda: scale,
      bias=bias,
    )
    return advise(self, self.advice, self.site, f, x, ctx)


@dataclasses.dataclass(frozen=True)
class NormForm:
  """Which norm a model has.

  Attributes:
    centred: `LayerNorm` instead of `RMSNorm`.
    offset: see `RMSNorm`.
  """

  eps: float = 1e-6
  centred: bool = False
  offset: float = 0.0

  def at(
    self,
    site: str,
    advice: Advice,
    param_dtype: Any,
    name: str | None = None,
  ) -> nn.Module:
    """The norm's module at a site; `name` where a compact call makes it."""
    if self.centred:
      return LayerNorm(site, advice, self.eps, param_dtype, name=name)
    return RMSNorm(site, advice, self.eps, param_dtype, self.offset, name=name)
