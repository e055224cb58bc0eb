# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning: trained keys and values before those of the tokens.

Li and Liang, arXiv:2101.00190; without the MLP in every layer it is P-tuning v2
(Liu et al., arXiv:2110.07602). An adapter at an attention's core adds them to
the keys and values of each call, so caches, packing and positions do not know
of them. They have no position: RoPE, ALiBi, relative biases and windows act
between tokens alone, and the positions of the tokens stay as they are. In
transformers a prefix is a cache that was filled before, so the tokens are
further back by its length; `moepeft.checkpoints.hf.peft_prefix` rotates the
keys by that difference.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from moepeft.config.method_string import Spec
from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.attention import Heads
from moepeft.nn.initializers import (
  Normal,
  kaiming_uniform,
  peft_param,
)
from moepeft.peft.low_rank import DROPOUT
from moepeft.peft.method import Method

# torch.nn.Embedding's initializer, in the released code of both papers.
_INIT = Normal(1)


class Prefix(nn.Module):
  """Attention over r more keys and values, which every query sees.

  With `hidden` they are tanh(E D + c) U + b, as in Li and Liang's section 4.3,
  where all layers share E and D; here each attention has its own. An export
  has the keys and values that result.

  A vector of zeros, in key and value, is padding of a pool and not seen.

  Parameters: k, v [r, k, h], float32; with `hidden`, m, of it: embedding
  [r, n h], down [n h, m], down_bias [m], up_k, up_v [m, k, h], bias_k, bias_v
  [k, h].

  Attributes:
    length: r.
    hidden: m, the size of the MLP's hidden layer; 0 for no MLP.
    dropout: of keys and values, in training.
  """

  length: int = option(20, Range(1, 65_536))
  hidden: int = option(0, Range(0, 65_536))
  dropout: float = option(0.0, DROPOUT, training_only=True)

  @nn.compact
  def __call__(self, f: BaseLayer, heads: Heads, ctx: Context) -> Array:
    check_heads(self, heads)
    k, v = (
      self._mlp(heads)
      if self.hidden
      else keys_values(self, heads, (self.length,), 'r')
    )
    return f(lengthen(heads, *self._drop(k, v, ctx)))

  @nn.nowrap
  def mix(
    self,
    module: nn.Module,
    f: BaseLayer,
    heads: Heads,
    ctx: Context,
    mixing: Any,
  ) -> Array:
    """Attention over the keys of all experts, those of e with weight p_e.

    The weight multiplies the exponentials of the expert's logits, before they
    are divided by their sum with those of the tokens. A weight of zero hides
    the expert, and one expert with a weight of one is the single method.

    Parameters: k, v [e, r, k, h].
    """
    check_heads(module, heads)
    if self.hidden:
      raise ValueError(
        f'{module.name}: experts of prefix tuning have no MLP; leave out hidden'
      )
    shape = (mixing.experts, self.length)
    k, v = (
      a.reshape(-1, *a.shape[2:])
      for a in self._drop(*keys_values(module, heads, shape, 'er'), ctx)
    )
    weights = mixing.weights()
    if weights.ndim == 3:
      weights = weights[:, :, None]
    # [b, t, 1 or n, e] -> [b, 1 or n, t, e r].
    weights = jnp.repeat(jnp.moveaxis(weights, 2, 1), self.length, axis=-1)
    visible = weights > 0
    bias = jnp.log(jnp.where(visible, weights, 1))
    return f(lengthen(heads, k, v, bias, visible))

  @nn.nowrap
  def _mlp(self, heads: Heads) -> tuple[Array, Array]:
    """The keys and values that the MLP computes."""
    n, h = heads.q.shape[2:]
    r, k, m, size = self.length, heads.k.shape[2], self.hidden, n * h
    draw, draw_up = kaiming_uniform(size), kaiming_uniform(m)
    arrays = {
      'embedding': peft_param(self, 'embedding', _INIT, (r, size), 'ri'),
      'down': peft_param(self, 'down', draw, (size, m), 'ir'),
      'down_bias': peft_param(self, 'down_bias', draw, (m,), 'r'),
    }
    for name in 'kv':
      up, bias = f'up_{name}', f'bias_{name}'
      arrays[up] = peft_param(self, up, draw_up, (m, k, h), 'rkh')
      arrays[bias] = peft_param(self, bias, draw_up, (k, h), 'kh')
    return _from_mlp(arrays, jnp)

  @nn.nowrap
  def _drop(self, k: Array, v: Array, ctx: Context) -> tuple[Array, Array]:
    drop = nn.Dropout(self.dropout)
    k, v = (drop(a, deterministic=not ctx.train) for a in (k, v))
    return k, v


def check_heads(module: nn.Module, heads: Any) -> None:
  """Raises a ValueError where the site is not an attention's core."""
  if not isinstance(heads, Heads):
    raise ValueError(
      f'{module.name} acts at the core of attentions (like */core) only; leave '
      'out `targets`'
    )


def keys_values(
  module: nn.Module, heads: Heads, shape: tuple[int, ...], axes: str
) -> tuple[Array, Array]:
  """The parameters k and v, [*shape, k, h] each."""
  shape = (*shape, *heads.k.shape[2:])
  k, v = (peft_param(module, name, _INIT, shape, f'{axes}kh') for name in 'kv')
  return k, v


def lengthen(
  heads: Heads,
  k: Array,
  v: Array,
  bias: Array | None = None,
  visible: Array | bool = True,
) -> Heads:
  """The heads with keys and values [r, k, h] before those of the tokens.

  Args:
    bias: float32 [..., r], added to the logits of the new keys.
    visible: bool [..., r], the new keys that a query sees, unless they are
      padding.
  """
  b, s = heads.k.shape[:2]
  visible &= jnp.any((k != 0) | (v != 0), axis=(1, 2))[None, None, None]

  def before(new, tokens):
    new = jnp.broadcast_to(new.astype(tokens.dtype), (b, *new.shape))
    return jnp.concatenate([new, tokens], axis=1)

  def joined(new, tokens, fill):
    if new is None and tokens is None:
      return None
    new, tokens = (
      jnp.full((1, 1, 1, size), fill) if a is None else a
      for a, size in ((new, len(k)), (tokens, s))
    )
    outer = jnp.broadcast_shapes(new.shape[:-1], tokens.shape[:-1])
    parts = (jnp.broadcast_to(a, (*outer, a.shape[-1])) for a in (new, tokens))
    return jnp.concatenate([*parts], axis=-1)

  return heads.replace(
    k=before(k, heads.k),
    v=before(v, heads.v),
    bias=joined(bias, heads.bias, 0.0),
    mask=joined(visible, heads.mask, True),
  )


def _from_mlp(arrays: dict[str, Any], xp: Any) -> tuple[Any, Any]:
  """(k, v) that an MLP computes, of one layer or of all; xp: NumPy or JAX's."""
  z = arrays['embedding'] @ arrays['down'] + arrays['down_bias'][..., None, :]
  z = xp.tanh(z)
  k, v = (
    xp.einsum('...rm,...mkh->...rkh', z, arrays[f'up_{name}'])
    + arrays[f'bias_{name}'][..., None, :, :]
    for name in 'kv'
  )
  return k, v


def fold(spec: Spec, arrays: dict[str, Any]) -> tuple[Spec, dict[str, Any]]:
  """The prefix without its MLP, with the keys and values that this computes."""
  if 'embedding' not in arrays:
    return spec, arrays
  options = tuple(o for o in spec.options if o[0] != 'hidden')
  k, v = _from_mlp(arrays, np)
  return Spec(spec.name, options), {'k': k, 'v': v}


METHOD = Method(
  module=Prefix,
  # The attention cores of a T5's encoder, its decoder and between them.
  roles={'official': ('core',), 'paper': ('core',)},
  any_weights=True,
  why_not='its keys and values are of no token',
  initial_change='its keys and values take attention from the first step on',
  size_option='length',
  scaled_leaves=(),
  fold=fold,
)
