# SPDX-License-Identifier: Apache-2.0
"""LoRA inside a whole feed-forward sublayer, as an expert of MixLoRA.

Each expert is the frozen feed-forward with low-rank terms of its own at the
gate, the up- and the down-projection (Li et al., arXiv:2404.15159). The
experts share the frozen weights, whose three products are computed
once: those with x do not depend on the expert, and the down-projection of the
weighted sum of hidden activations is the weighted sum of the down-projections.
Experts are computed one after the other, and again for the gradient, so that
[b, t, e, f] is never stored. With a sparse router, only a token's k experts are
computed; see `moepeft.moe.dispatch`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Choices, option
from moepeft.core.types import Array, Context
from moepeft.moe.dispatch import Dispatch
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import kaiming_uniform, peft_param
from moepeft.peft.low_rank import ALPHA, DROPOUT, RANK, down, up
from moepeft.peft.method import Method
from moepeft.peft.methods.lora import INIT_A, INIT_B


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

    low = drop(x, self.dropout)
    kernels = {'gate': factors('gate', d, ffn, 'df')}
    if linear is not None:
      kernels['up'] = factors('up', d, ffn, 'df')
    kernels['down'] = down_a, down_b = factors('down', ffn, d, 'fd')
    weights = (
      mixing.weights() if mixing else jnp.ones((*x.shape[:2], 1), jnp.float32)
    ).astype(gate.dtype)
    # One mask for all experts, as for the hidden units of one feed-forward.
    dense = jnp.ones_like(gate)
    mask = drop(dense, base.dropout)
    low_rank_mask = drop(dense, self.dropout)
    slots = mixing and mixing.slots(_pays)
    if slots:
      inputs = (low, gate, linear, mask, low_rank_mask)
      run = functools.partial(_sparse, base.activation, scale)
      hidden, term = jax.checkpoint(run)(slots, kernels, inputs)
      return _with_bias(base.down(hidden) + term, weights, base.down_bias)
    stacked = {
      name: (_first(down(low, a)), b)
      for name, (a, b) in kernels.items()
      if name != 'down'
    }

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
    return _with_bias(y, weights, base.down_bias)


def _sparse(
  activation: Callable[[Array], Array],
  scale: float,
  slots: Dispatch,
  kernels: Mapping[str, tuple[Array, Array]],
  inputs: Sequence[Array | None],
) -> tuple[Array, Array]:
  """(the weighted hidden activations [b, t, f], the term [b, t, d]).

  Args:
    kernels: {projection: (A [in, e, r], B [e, r, out])}.
    inputs: the dropped-out input, gate(x), up(x) or None, the dropout masks of
      the hidden units and of the down-projection's low-rank term.
  """
  shape = inputs[0].shape[:2]
  low, gate, linear, mask, low_rank_mask = (
    None if x is None else slots.to_slots(x.reshape(-1, x.shape[-1]))
    for x in inputs
  )

  def term(x: Array, name: str, weights: Array | float = 1.0) -> Array:
    a, b = (kernel.astype(x.dtype) for kernel in kernels[name])
    z = slots.matmul(x, jnp.moveaxis(a, 1, 0))
    return slots.matmul((z * (weights * scale)).astype(x.dtype), b)

  h = activation(gate + term(low, 'gate'))
  if linear is not None:
    h = h * (linear + term(low, 'up'))
  h = h * mask
  weights = slots.weights[:, None].astype(h.dtype)
  y = term(h * low_rank_mask, 'down', weights)
  return tuple(
    slots.from_slots(x).reshape(*shape, -1) for x in (weights * h, y)
  )


def _pays(tokens: int, e: int, k: int) -> bool:
  """Whether sorting tokens by expert is faster than computing all experts.

  Measured; docs/methods.md has the table.
  """
  return tokens >= 256 and e >= 4 * k


def _with_bias(y: Array, weights: Array, bias: Array | None) -> Array:
  if bias is None:
    return y
  # Each expert has the bias, with its weight.
  rest = jnp.sum(weights, axis=-1, keepdims=True) - 1
  return y + (rest * bias).astype(y.dtype)


def _first(array: Array, axis: int = 2) -> Array:
  """The array with its axis of experts in front."""
  return jnp.moveaxis(array, axis, 0)


METHOD = Method(
  module=FfnLora,
  roles={'official': ('mlp',), 'paper': ('mlp',)},
  replaces=('act', 'hidden'),
  dispatches=True,
  size_option='rank',
  scaled_leaves=('gate_b', 'up_b', 'down_b'),
  why_not=(
    'it acts inside of a feed-forward; lora at its projections is the same '
    'function and can be merged'
  ),
)
