# SPDX-License-Identifier: Apache-2.0
"""The feed-forward sublayer, optionally gated (arXiv:2002.05202)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import ActivationHook, AdapterMap
from moepeft.nn.linear import Linear
from moepeft.nn.norms import NormForm

ACTIVATIONS = {
  'gelu': nn.gelu,
  'gelu_exact': functools.partial(nn.gelu, approximate=False),
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class FeedForward:
  """The layers of a feed-forward sublayer: down(activation(gate(x)) * up(x)).

  Attributes:
    gate: x [b, t, d] -> [b, t, f].
    up: the same; None where the sublayer is not gated.
    activation: of the gate.
    down: [b, t, f] -> [b, t, d], its bias included.
    down_bias: [d], or None.
    dropout: the rate, of the input of `down`.
  """

  gate: Callable[[Array], Array]
  up: Callable[[Array], Array] | None
  activation: Callable[[Array], Array]
  down: Callable[[Array], Array]
  down_bias: Array | None
  dropout: float


class Mlp(nn.Module):
  """wo(act(wi_0 x) * wi_1 x) if gated, else wo(act(wi x)).

  Sites below `site`: norm, wi_0 and wi_1 (or wi), the activations `act` (after
  the activation function) and `hidden` (the input of wo), and wo.
  """

  d_model: int
  ffn: int
  gated: bool
  activation: str
  site: str
  adapter_map: AdapterMap
  dropout: float = 0.0
  norm_form: NormForm = NormForm()
  bias: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def setup(self):
    def linear(name, eqn, *shape):
      return Linear(
        eqn,
        shape,
        f'{self.site}/{name}',
        self.adapter_map,
        stddev=shape[0] ** -0.5,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        bias=self.bias,
      )

    d, f = self.d_model, self.ffn
    if self.gated:
      self.wi_0 = linear('wi_0', 'btd,df->btf', d, f)
      self.wi_1 = linear('wi_1', 'btd,df->btf', d, f)
    else:
      self.wi = linear('wi', 'btd,df->btf', d, f)
    self.act = ActivationHook(f'{self.site}/act', self.adapter_map, 'f')
    self.hidden = ActivationHook(f'{self.site}/hidden', self.adapter_map, 'f')
    self.wo = linear('wo', 'btf,fd->btd', f, d)
    self.drop = nn.Dropout(self.dropout)
    # The block calls the norm, so that the sublayer's site has normed input.
    site = f'{self.site}/norm'
    self.norm = self.norm_form.at(site, self.adapter_map, self.param_dtype)

  def __call__(self, x: Array, ctx: Context) -> Array:
    gate = self.wi_0 if self.gated else self.wi
    y = self.act(ACTIVATIONS[self.activation](gate(x, ctx)), ctx)
    if self.gated:
      y = y * self.wi_1(x, ctx)
    y = self.drop(y, deterministic=not ctx.train)
    return self.wo(self.hidden(y, ctx), ctx)

  def feed_forward(self, ctx: Context) -> FeedForward:
    """The projections, with the adapters at their sites, and the activation.

    The adapters at `act` and `hidden` are left out.
    """
    gate = self.wi_0 if self.gated else self.wi
    return FeedForward(
      gate=lambda x: gate(x, ctx),
      up=(lambda x: self.wi_1(x, ctx)) if self.gated else None,
      activation=ACTIVATIONS[self.activation],
      down=lambda h: self.wo(h, ctx),
      down_bias=self.wo.get_variable('params', 'bias') if self.bias else None,
      dropout=self.dropout,
    )
