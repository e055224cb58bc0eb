# SPDX-License-Identifier: Apache-2.0
"""A base class with the fields that models, stacks and blocks share."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.scan_layers import scan_layers


class Transformer(nn.Module):
  """A model, or one of its stacks or blocks.

  Attributes:
    config: the config of the model family.
    adapter_map: the adapters by site; see `moepeft.peft.build`.
    scan: whether layers are scanned (True) or unrolled.
    remat: 'none', 'dots' or 'full'.
    unroll: the number of layers in one step of the scan.
    dtype: the dtype of activations; logits are float32.
    param_dtype: the dtype of weights at initialization.
    attention: a key of `nn.attention.IMPLEMENTATIONS`.
  """

  config: Any
  adapter_map: AdapterMap = AdapterMap()
  scan: bool = True
  remat: str = 'none'
  unroll: int = 1
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  attention: str = 'naive'

  @property
  def shared(self) -> dict[str, Any]:
    """The fields above, for a stack or block of this model."""
    names = (field.name for field in dataclasses.fields(Transformer))
    return {
      name: getattr(self, name)
      for name in names
      if name not in ('parent', 'name')
    }

  @property
  def dtypes(self) -> dict[str, Any]:
    return {'dtype': self.dtype, 'param_dtype': self.param_dtype}

  def scan_layers(
    self, block: nn.Module, layers: int, x: Array, ctx: Context, *args
  ) -> Array:
    """`nn.scan_layers.scan_layers` with the fields of this module."""
    return scan_layers(
      block,
      layers,
      x,
      ctx,
      *args,
      scan=self.scan,
      remat=self.remat,
      unroll=self.unroll,
    )
