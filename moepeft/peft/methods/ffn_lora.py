# SPDX-License-Identifier: Apache-2.0
"""LoRA inside a whole feed-forward sublayer, as an expert of MixLoRA.

Each expert is the frozen feed-forward with low-rank terms of its own at the
gate, the up- and the down-projection (Li et al., arXiv:2404.15159, section
3.1). The experts share the frozen weights, whose three products are computed
once: those with x do not depend on the expert, and the down-projection of the
weighted sum of hidden activations is the weighted sum of the down-projections.
Experts are computed one after the other, and again for the gradient, so that
[b, t, e, f] is never stored.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Choices, option
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import kaiming_uniform, peft_param
from moepeft.peft.method import Method
from moepeft.peft.methods.lora import (
  ALPHA,
  DROPOUT,
  INIT_A,
  INIT_B,
  RANK,
  down,
  up,
)


class FfnLora(nn.Module):
  """Low-rank terms at the projections of a feed-forward sublayer.

  Parameters, for each of gate, up (where the sublayer is gated) and down:
  {name}_a [in, r], {name}_b [r, out] zeros, float32.

  Attributes: as of `Lora`.
  """

  rank: int = option(4, RANK)
  alpha: float = option(16.0, ALPHA)
  dropout: float = option(0.0, DROPOUT, training_only=True)
  a_init: str = option(
    'normal', Choices(('normal', 'kaiming')), training_only=True
  )

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    return self._run(self, f, x, ctx, None)

  @nn.nowrap
  def mix(
    self, module: nn.Module, f: BaseLayer, x: Array, ctx: Context, mixing: Any
  ) -> Array:
    """sum_e p_e ffn_e(x).

    Parameters: {name}_a [in, e, r], {name}_b [e, r, out].
    """
    return self._run(module, f, x, ctx, mixing)

  @nn.nowrap
  def _run(self, module, f, x, ctx, mixing) -> Array:
    if getattr(f.module, 'feed_forward', None) is None:
      raise ValueError(
        'ffn_lora acts at whole feed-forward sublayers (like */mlp), inside of '
        'all other adapters there; leave out `targets`, and put it first'
      )
    base = f.module.feed_forward(ctx)
    gate = base.gate(x)
    x = x.astype(gate.dtype)
    linear = base.up(x) if base.up else None
    d, ffn = x.shape[-1], gate.shape[-1]
    e = mixing.experts if mixing else 1
    scale = self.alpha / self.rank

    def factors(name, inputs, outputs, axes):
      """A [in, e, r] and B [e, r, out]."""
      sizes, letter = ((e,), 'e') if mixing else ((), '')
      init = INIT_A if self.a_init == 'normal' else kaiming_uniform(inputs)
      shape_a = (inputs, *sizes, self.rank)
      shape_b = (*sizes, self.rank, outputs)
      a = peft_param(module, f'{name}_a', init, shape_a, f'{axes[0]}{letter}r')
      b = peft_param(
        module, f'{name}_b', INIT_B, shape_b, f'{letter}r{axes[1]}'
      )
      return a.reshape(inputs, e, -1), b.reshape(e, -1, outputs)

    def drop(y, rate):
      dropout = nn.Dropout(rate)
      return dropout(y, deterministic=not ctx.train)

    gate_a, gate_b = factors('gate', d, ffn, 'df')
    low = drop(x, self.dropout)
    stacked = {'gate': (_first(down(low, gate_a)), gate_b)}
    if linear is not None:
      up_a, up_b = factors('up', d, ffn, 'df')
      stacked['up'] = (_first(down(low, up_a)), up_b)
    down_a, down_b = factors('down', ffn, d, 'fd')
    weights = (
      mixing.weights() if mixing else jnp.ones((*x.shape[:2], 1), jnp.float32)
    ).astype(gate.dtype)
    # One mask for all experts, as for the hidden units of one feed-forward.
    dense = jnp.ones_like(gate)
    mask = drop(dense, base.dropout)
    low_rank_mask = drop(dense, self.dropout)

    def one_expert(total, expert):
      z, b = expert['gate']
      h = base.activation(gate + scale * up(z, b))
      if linear is not None:
        z, b = expert['up']
        h = h * (linear + scale * up(z, b))
      h = h * mask
      total = total + expert['weight'][..., None] * h
      return total, down(h * low_rank_mask, expert['down_a'])

    stacked |= {'weight': _first(weights), 'down_a': _first(down_a, 1)}
    hidden, z = jax.lax.scan(
      jax.checkpoint(one_expert), jnp.zeros_like(gate), stacked
    )
    y = base.down(hidden)
    z = jnp.moveaxis(z, 0, 2) * (weights * scale)[..., None]
    y = y + up(z.astype(y.dtype), down_b)
    if base.down_bias is not None:
      # Each expert has the bias, with its weight.
      rest = jnp.sum(weights, axis=-1, keepdims=True) - 1
      y = y + (rest * base.down_bias).astype(y.dtype)
    return y


def _first(array: Array, axis: int = 2) -> Array:
  """The array with its axis of experts in front."""
  return jnp.moveaxis(array, axis, 0)


METHOD = Method(
  module=FfnLora,
  roles={'official': ('mlp',), 'paper': ('mlp',)},
  replaces=('act', 'hidden'),
  size_option='rank',
  scaled_leaves=('gate_b', 'up_b', 'down_b'),
  why_not=(
    'it acts inside of a feed-forward; lora at its projections is the same '
    'function and can be merged'
  ),
)
