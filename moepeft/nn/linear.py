# SPDX-License-Identifier: Apache-2.0
"""Frozen projections and the embedding, each one a site."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moepeft.nn.parameter import param
from moepeft.nn.site import (
  Advice,
  Frozen,
  advise,
  contract,
  contraction,
  kernel_letters,
)
from moepeft.nn.start import Normal
from moepeft.typing import Array, Context


class Linear(nn.Module):
  """y = einsum(eqn, x, kernel), at a site.

  Attributes:
    eqn: 'btd,dnh->btnh' and the like; two operands, the kernel second.
    shape: the kernel's shape in the equation's order.
    site: the site's path, 'encoder/self/q'.
    stddev: of the normal initialiser.
    accumulate: the dtype of the result; None for `dtype`.
  """

  eqn: str
  shape: tuple[int, ...]
  site: str
  advice: Advice
  stddev: float
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  accumulate: Any = None

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    start = Normal(self.stddev)
    kernel = param(
      self,
      'kernel',
      start,
      self.shape,
      kernel_letters(self.eqn),
      self.param_dtype,
    )
    f = frozen_einsum(self.eqn, kernel, self.dtype, self.accumulate)
    return advise(self, self.advice, self.site, f, x, ctx)


def frozen_einsum(eqn: str, kernel: Array, dtype, accumulate=None) -> Frozen:
  """The frozen call of a projection whose weight is `kernel`."""

  def weight():
    return kernel.astype(dtype)

  def call(x):
    return contract(eqn, x.astype(dtype), weight(), accumulate)

  _, inside, outside, _ = contraction(eqn)
  return Frozen(
    call,
    eqn=eqn,
    shape=kernel.shape,
    inside=inside,
    outside=outside,
    kernel=weight,
  )


class Embedding(nn.Module):
  """Token ids [b, t] -> [b, t, d], at the site 'embed'."""

  vocab: int
  d_model: int
  advice: Advice
  site: str = 'embed'
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  stddev: float = 1.0

  @nn.compact
  def __call__(self, ids: Array, ctx: Context) -> Array:
    shape = (self.vocab, self.d_model)
    start = Normal(self.stddev)
    table = param(self, 'embedding', start, shape, 'vd', self.param_dtype)

    def weight():
      return table.astype(self.dtype)

    f = Frozen(
      lambda ids: jnp.take(weight(), ids, axis=0),
      shape=shape,
      outside='d',
      kernel=weight,
    )
    return advise(self, self.advice, self.site, f, ids, ctx)

  def attend(self) -> Array:
    """The table [v, d] itself, for a head tied to it."""
    return self.get_variable('params', 'embedding').astype(self.dtype)
