# SPDX-License-Identifier: Apache-2.0
"""Root mean square layer norm (Zhang & Sennrich, arXiv:1910.07467)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.nn.parameter import param
from moepeft.nn.precision import wide
from moepeft.nn.site import Advice, Frozen, advise
from moepeft.nn.start import Fill
from moepeft.typing import Array, Context


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
  """x / rms(x) * scale over the last axis; float32 inside, x's dtype out."""
  y = wide(x)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  return (y * wide(scale)).astype(x.dtype)


class RMSNorm(nn.Module):
  """`rms_norm` with its scale [d], at a site."""

  site: str
  advice: Advice
  eps: float = 1e-6
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    scale = param(self, 'scale', Fill(1), x.shape[-1:], 'd', self.param_dtype)
    f = Frozen(
      lambda x: rms_norm(x, scale, self.eps),
      shape=scale.shape,
      inside='d',
      outside='d',
      kernel=lambda: scale,
    )
    return advise(self, self.advice, self.site, f, x, ctx)
