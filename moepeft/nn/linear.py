# SPDX-License-Identifier: Apache-2.0
"""The projections, the embedding and the head of a base model, each a site."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.nn import quantization
from moepeft.nn.adapter_hook import (
  AdapterMap,
  BaseLayer,
  apply_adapters,
  contract,
  contraction,
  kernel_letters,
)
from moepeft.nn.initializers import Constant, Normal, param
from moepeft.nn.quantization import QuantizedKernel


class Linear(nn.Module):
  """y = einsum(eqn, x, kernel) [+ bias], at a site.

  Attributes:
    eqn: an einsum of x and the kernel, such as 'btd,dnh->btnh'.
    shape: the kernel's shape in the equation's order.
    site: the site's path, 'encoder/self/q'.
    stddev: the standard deviation of the normal initializer.
    accumulate: the dtype of the result; None for `dtype`.
    bias: whether there is a bias, with the kernel's output axes.
  """

  eqn: str
  shape: tuple[int, ...]
  site: str
  adapter_map: AdapterMap
  stddev: float
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  accumulate: Any = None
  bias: bool = False

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    kernel = quantization.quantized_kernel(self, 'kernel', self.eqn, self.shape)
    if kernel is None:
      kernel = param(
        self,
        'kernel',
        Normal(self.stddev),
        self.shape,
        kernel_letters(self.eqn),
        self.param_dtype,
      )
    bias = self._bias() if self.bias else None
    f = base_projection(self.eqn, kernel, self.dtype, self.accumulate, bias)
    return apply_adapters(self, self.adapter_map, self.site, f, x, ctx)

  def _bias(self) -> Array:
    _, inside, outside, _ = contraction(self.eqn)
    shape = self.shape[len(inside) :]
    return param(self, 'bias', Constant(0), shape, outside, self.param_dtype)


def base_projection(
  eqn: str,
  kernel: Array | QuantizedKernel,
  dtype,
  accumulate=None,
  bias: Array | None = None,
) -> BaseLayer:
  """The layer of a projection whose weight is `kernel`."""

  def weight():
    return kernel.astype(dtype)

  def call(x):
    y = contract(eqn, x.astype(dtype), weight(), accumulate)
    return y if bias is None else y + bias.astype(y.dtype)

  if isinstance(kernel, QuantizedKernel):
    # Dequantized again in the backward pass; otherwise a scan would keep the
    # dequantized kernels of all layers.
    call = jax.checkpoint(call)
  _, inside, outside, _ = contraction(eqn)
  return BaseLayer(
    call,
    eqn=eqn,
    shape=kernel.shape,
    input_axes=inside,
    output_axes=outside,
    kernel=weight,
    bias=bias,
  )


class Embedding(nn.Module):
  """Ids [b, t] -> [b, t, d], at a site; `letter` is the axis of its ids."""

  vocab: int
  d_model: int
  adapter_map: AdapterMap
  site: str = 'embed'
  letter: str = 'v'
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  stddev: float = 1.0

  @nn.compact
  def __call__(self, ids: Array, ctx: Context) -> Array:
    shape = (self.vocab, self.d_model)
    start = Normal(self.stddev)
    axes = f'{self.letter}d'
    table = param(self, 'embedding', start, shape, axes, self.param_dtype)

    def weight():
      return table.astype(self.dtype)

    f = BaseLayer(
      lambda ids: jnp.take(weight(), ids, axis=0),
      shape=shape,
      output_axes='d',
      kernel=weight,
    )
    return apply_adapters(self, self.adapter_map, self.site, f, ids, ctx)

  def attend(self) -> Array:
    """The table [v, d], for a tied head."""
    return self.get_variable('params', 'embedding').astype(self.dtype)


class Head(nn.Module):
  """States [b, t, d] -> logits [b, t, v], at least float32, at 'head'.

  Attributes:
    cap: the soft cap, cap * tanh(logits / cap); 0 for none.
    bias: whether there is a bias [v].
  """

  d_model: int
  vocab: int
  adapter_map: AdapterMap
  cap: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  bias: bool = False

  @nn.compact
  def __call__(self, x: Array, ctx: Context, tied: Embedding | None) -> Array:
    wide = jnp.promote_types(self.dtype, jnp.float32)
    eqn = 'btd,dv->btv'
    if tied is None:
      shape = (self.d_model, self.vocab)
      start = Normal(self.d_model**-0.5)
      kernel = param(self, 'kernel', start, shape, 'dv', self.param_dtype)
      f = base_projection(eqn, kernel, self.dtype, wide)
    else:
      f = _tied_projection(eqn, tied.attend(), self.dtype, wide)
    f = dataclasses.replace(f, tied_embedding=tied)
    if self.bias:
      f = _add_bias(f, self._bias())
    logits = apply_adapters(self, self.adapter_map, 'head', f, x, ctx)
    return self.cap * jnp.tanh(logits / self.cap) if self.cap else logits

  def _bias(self) -> Array:
    return param(
      self, 'bias', Constant(0), (self.vocab,), 'v', self.param_dtype
    )


def _add_bias(f: BaseLayer, bias: Array) -> BaseLayer:
  """The layer with a bias added to its output."""

  def call(x):
    y = f(x)
    return y + bias.astype(y.dtype)

  return dataclasses.replace(f, call=call, bias=bias)


def _tied_projection(eqn: str, table: Array, dtype, accumulate) -> BaseLayer:
  """The layer of a head whose weight is the table's transpose."""

  def call(x):
    x = x.astype(dtype)
    if x.shape[1] > 1:
      return jnp.einsum(
        'btd,vd->btv', x, table, preferred_element_type=accumulate
      )
    # With one token per row, this reads the table once and in order. The
    # einsum above takes four times as long on CPU.
    y = jnp.einsum('vd,btd->vbt', table, x, preferred_element_type=accumulate)
    return jnp.moveaxis(y, 0, -1)

  return BaseLayer(
    call,
    eqn=eqn,
    shape=table.shape[::-1],
    input_axes='d',
    output_axes='v',
    kernel=lambda: table.T,
  )
