# SPDX-License-Identifier: Apache-2.0
"""Self-attention of decoder-only models: grouped, rotary, cached."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.attention import Core, Heads
from moepeft.nn.attention_mask import AttentionMask, CausalMask
from moepeft.nn.linear import Linear
from moepeft.nn.norms import NormForm, RMSNorm
from moepeft.nn.rope import Rope, rotate


class CausalAttention(nn.Module):
  """Sites below `site`: norm, q, k, v, q_norm and k_norm (where `qk_norm`),
  core (whose input is `Heads`), o.

  Attributes:
    kv_heads: the number of key-value heads, a divisor of `heads`.
    rope: None for models without rotary embedding.
    scale: the factor of the logits.
    cap: see `attention.attend`.
    bias: whether q, k and v have biases.
    out_bias: whether o has a bias.
    qk_norm: whether q and k have a norm over each head before the rotation
      (Qwen3).
    implementation: a key of `attention.IMPLEMENTATIONS`.
  """

  d_model: int
  heads: int
  kv_heads: int
  head_dim: int
  site: str
  adapter_map: AdapterMap
  rope: Rope | None
  scale: float
  cap: float = 0.0
  dropout: float = 0.0
  bias: bool = False
  out_bias: bool = False
  qk_norm: bool = False
  norm_form: NormForm = NormForm()
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  implementation: str = 'naive'

  def setup(self):
    d, n, h = self.d_model, self.heads, self.head_dim
    k = self.kv_heads

    def linear(name, eqn, shape, bias, stddev):
      return Linear(
        eqn,
        shape,
        f'{self.site}/{name}',
        self.adapter_map,
        stddev=stddev,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        bias=bias,
      )

    keys = 'btd,dkh->btkh'
    self.q = linear('q', 'btd,dnh->btnh', (d, n, h), self.bias, d**-0.5)
    self.k = linear('k', keys, (d, k, h), self.bias, d**-0.5)
    self.v = linear('v', keys, (d, k, h), self.bias, d**-0.5)
    shape, stddev = (n, h, d), (n * h) ** -0.5
    self.o = linear('o', 'btnh,nhd->btd', shape, self.out_bias, stddev)
    site = f'{self.site}/core'
    self.core = Core(
      site,
      self.adapter_map,
      self.scale,
      self.dropout,
      self.cap,
      self.implementation,
    )
    if self.qk_norm:
      self.q_norm, self.k_norm = (
        RMSNorm(
          f'{self.site}/{name}',
          self.adapter_map,
          self.norm_form.eps,
          self.param_dtype,
          self.norm_form.offset,
          letter='h',
        )
        for name in ('q_norm', 'k_norm')
      )
    # The block calls the norm, so that the sublayer's site has normed input.
    site = f'{self.site}/norm'
    self.norm = self.norm_form.at(site, self.adapter_map, self.param_dtype)

  def __call__(
    self,
    x: Array,
    ctx: Context,
    bias: Array | None,
    mask: Array | None,
    structured_mask: AttentionMask | CausalMask | None = None,
  ) -> Array:
    """x [b, t, d] -> [b, t, d]; needs ctx.positions [b, t].

    Args:
      bias: [1 or b, n, t, s] or None; s is the cache's length in decoding.
      mask: bool [b, 1, t, s].
      structured_mask: replaces both if the implementation needs no array
        [t, s]. Adapters at the core always get bias and mask, because they may
        add keys.
    """
    q, k, v = self.q(x, ctx), self.k(x, ctx), self.v(x, ctx)
    if self.qk_norm:
      q, k = self.q_norm(q, ctx), self.k_norm(k, ctx)
    if self.rope is not None:
      q, k = (rotate(a, ctx.positions, self.rope) for a in (q, k))
    if ctx.decode:
      k, v = (
        self._update_cache(name, a, ctx) for name, a in (('k', k), ('v', v))
      )
    if structured_mask is not None and self.adapter_map.at(f'{self.site}/core'):
      bias, mask, structured_mask = (
        structured_mask.bias(),
        structured_mask.mask(),
        None,
      )
    heads = Heads(q, k, v, bias, mask, structured_mask, not ctx.decode)
    return self.o(self.core(heads, ctx), ctx)

  def _update_cache(self, name: str, new: Array, ctx: Context) -> Array:
    """Writes `new` [b, t, k, h] from each row's first position on.

    Returns:
      The cache, [b, s, k, h].
    """
    b, _, k, h = new.shape
    name = f'self_{name}'
    # Heads before positions, the order in which products read them.
    empty = jnp.zeros((b, k, ctx.cache_length, h), new.dtype)
    cache = self.get_variable('cache', name, empty)
    write = jax.vmap(
      lambda row, x, i: jax.lax.dynamic_update_slice_in_dim(row, x, i, 1)
    )
    cache = write(cache, new.swapaxes(1, 2), ctx.positions[:, 0])
    self.put_variable('cache', name, cache)
    return cache.swapaxes(1, 2)
