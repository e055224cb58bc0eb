# SPDX-License-Identifier: Apache-2.0
"""The Flax module of all decoder-only families.

A family (`llama`, `qwen3`, ...) defines its sizes and the names of its weights,
a `DecoderConfig` the options of the computation.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Batch, Context, Routing
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.masks import masks, row_causal_mask, segment_mask
from moepeft.models.sites import ATTENTION, context, feed_forward
from moepeft.models.transformer import Transformer
from moepeft.nn.adapter_hook import AdapterMap, SublayerHook
from moepeft.nn.attention import check_implementation
from moepeft.nn.attention_mask import NO_WINDOW, AttentionMask
from moepeft.nn.causal_attention import CausalAttention
from moepeft.nn.linear import Embedding, Head
from moepeft.nn.mlp import Mlp
from moepeft.nn.positions import alibi, alibi_slopes, sinusoidal


def sites(config: DecoderConfig) -> dict[str, str]:
  """Maps the path of each adapter site to its role."""
  attention, mlp = ATTENTION, feed_forward(config.gated)
  if config.qk_norm:
    attention = attention | {'/q_norm': 'norm', '/k_norm': 'norm'}
  if config.post_norms:
    attention = attention | {'_post_norm': 'norm'}
    mlp |= {'_post_norm': 'norm'}
  roles = {'embed': 'embed'}
  roles |= {f'decoder/self{part}': role for part, role in attention.items()}
  roles |= {f'decoder/mlp{part}': role for part, role in mlp.items()}
  return roles | {'decoder/norm': 'norm', 'head': 'head'}


class DecoderBlock(Transformer):
  """One layer: self-attention and a feed-forward, each added to its input."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x, ctx, bias, mask, window_mask, structured_mask):
    c = self.config
    # An array, as all layers share one compiled program.
    windowed = jnp.array(c.windowed or (True,) * c.layers)
    if window_mask is not None:
      mask = jnp.where(windowed[ctx.layer], window_mask, mask)
    if isinstance(structured_mask, AttentionMask) and c.window:
      window = jnp.where(windowed[ctx.layer], c.window, NO_WINDOW)
      structured_mask = structured_mask.replace(window=window)
    attention = CausalAttention(
      c.d_model,
      c.heads,
      c.kv_heads,
      c.head_dim,
      'decoder/self',
      self.adapter_map,
      c.rope if c.positions == 'rope' else None,
      c.scale or c.head_dim**-0.5,
      cap=c.attention_cap,
      dropout=c.dropout,
      bias=c.attention_bias,
      out_bias=c.out_bias,
      qk_norm=c.qk_norm,
      norm_form=c.norm_form,
      **self.dtypes,
      implementation=self.attention,
      name='self',
    )
    run = lambda attention, y: attention(y, ctx, bias, mask, structured_mask)  # noqa: E731
    x = self._residual('self', attention, run, x, ctx)
    mlp = Mlp(
      c.d_model,
      c.ffn,
      c.gated,
      c.activation,
      'decoder/mlp',
      self.adapter_map,
      dropout=c.dropout,
      norm_form=c.norm_form,
      bias=c.mlp_bias,
      **self.dtypes,
      name='mlp',
    )
    return self._residual('mlp', mlp, lambda mlp, y: mlp(y, ctx), x, ctx)

  def _residual(self, name, module, run, x, ctx):
    """x + dropout(norm?(sublayer(norm(x)))); adapters may wrap the sublayer."""
    c = self.config
    hook = SublayerHook(
      f'decoder/{name}', self.adapter_map, name=f'around_{name}'
    )
    y = hook(module, run, module.norm(x, ctx), ctx)
    if c.post_norms:
      name = f'{name}_post_norm'
      site = f'decoder/{name}'
      y = c.norm_form.at(site, self.adapter_map, self.param_dtype, name)(y, ctx)
    drop = nn.Dropout(c.dropout, broadcast_dims=(1,))
    return x + drop(y, deterministic=not ctx.train)


class DecoderStack(Transformer):
  """All layers and the final norm, from embeddings to hidden states."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    c = self.config
    mask = window_mask = bias = structured_mask = None
    slopes = alibi_slopes(c.heads) if c.positions == 'alibi' else None
    if self.attention == 'chunked':
      structured_mask = segment_mask(slopes, ctx)
    elif self.attention == 'fused' and slopes is None:
      structured_mask = row_causal_mask(c.window, c.windowed, ctx)
    if structured_mask is None:
      mask, window_mask = masks(c.window, ctx)
    if slopes and structured_mask is None:
      cache_positions = jnp.arange(ctx.cache_length)
      keys = cache_positions if ctx.decode else ctx.positions
      bias = alibi(c.heads, ctx.positions, keys)
    block = DecoderBlock(**self.shared, parent=None)
    drop = nn.Dropout(c.dropout, broadcast_dims=(1,))
    x = self.scan_layers(
      block,
      c.layers,
      drop(x, deterministic=not ctx.train),
      ctx,
      bias,
      mask,
      window_mask,
      structured_mask,
    )
    norm = c.norm_form.at(
      'decoder/norm', self.adapter_map, self.param_dtype, name='norm'
    )
    return norm(x, ctx)


class Decoder(Transformer):
  """A decoder-only model; `__call__` is for training, `extend` for decoding."""

  config: DecoderConfig

  def setup(self):
    c = self.config
    check_implementation(self.attention)
    stddev = 0.02
    self.embed = Embedding(
      c.vocab, c.d_model, self.adapter_map, stddev=stddev, **self.dtypes
    )
    if c.positions == 'learned':
      # Without adapters: the site 'embed' is the token embedding.
      self.positions = Embedding(
        c.length,
        c.d_model,
        AdapterMap(),
        site='positions',
        letter='p',
        stddev=stddev,
        **self.dtypes,
      )
    self.decoder = DecoderStack(**self.shared)
    self.head = Head(
      c.d_model, c.vocab, self.adapter_map, c.logits_cap, **self.dtypes
    )

  def __call__(
    self, batch: Batch, train: bool = False, routing: Routing | None = None
  ) -> Array:
    """Computes the logits of the next tokens of a batch, float32 [b, t, v].

    Args:
      batch: `inputs` int [b, t] and, optionally, `inputs_mask` (bool, False
        on the padding after a row's tokens; default: no padding), and, for
        packed rows, `inputs_segments` and `inputs_positions` (int).
      train: enables dropout and router noise (rngs 'dropout' and 'router').
      routing: [layers, b, t, e] of an earlier pass, for example of `states`;
        replaces the outputs of the routers.
    """
    ids = batch['inputs']
    ctx = context(batch, 'inputs', ids, train).replace(routing=routing)
    return self.logits(self.states(ids, ctx), ctx)

  def extend(self, ids: Array, ctx: Context) -> Array:
    """ids [b, t] that continue the cached tokens -> logits [b, t, v].

    Needs `ctx.decode`, `ctx.cache_length` and a mutable collection 'cache'.
    Rows may have different lengths: ctx.positions int [b, t] counts from the
    first new position of each row, at which the cache is written. Padding after
    a row's end is never attended to, and later tokens overwrite it.
    """
    return self.logits(self.states(ids, ctx), ctx)

  def states(self, ids: Array, ctx: Context) -> Array:
    """ids [b, t] -> outputs of the final norm [b, t, d].

    Where adapters read a first pass of the base alone, it precedes.
    """
    # An engine computes the first pass with a cache of its own.
    is_first = ctx.without_adapters or ctx.first_pass is not None
    if self.adapter_map.two_pass and not is_first:
      base = ctx.replace(without_adapters=True, train=False)
      first_pass = jax.lax.stop_gradient(self._one_pass(ids, base))
      ctx = ctx.replace(first_pass=first_pass)
    return self._one_pass(ids, ctx)

  def _one_pass(self, ids: Array, ctx: Context) -> Array:
    c = self.config
    # Also for packed rows, as the lengths of their texts are unknown here.
    learned = c.positions == 'learned'
    if learned and not ctx.decode and ids.shape[1] > c.length:
      raise ValueError(
        f'the model has {c.length} learned positions; got rows of '
        f'{ids.shape[1]} tokens: make them shorter (config.data.length)'
      )
    if ctx.positions is None:
      positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
      ctx = ctx.replace(positions=positions)
    ctx = ctx.replace(token_ids=ids)
    x = self.embed(ids, ctx)
    if c.scale_embedding:
      x = x * jnp.asarray(c.d_model**0.5, x.dtype)
    if learned:
      positions = ctx.positions
      if ctx.decode:
        # Positions of padding may exceed the table, which would give NaN, and a
        # zero attention weight times NaN is NaN.
        positions = jnp.minimum(positions, c.length - 1)
      x = x + self.positions(positions, ctx)
    elif c.positions == 'sinusoidal':
      x = x + sinusoidal(ctx.positions, c.d_model).astype(x.dtype)
    return self.decoder(x, ctx)

  def logits(self, x: Array, ctx: Context) -> Array:
    """`states` [b, t, d] -> logits [b, t, v]."""
    return self.head(x, ctx, self.embed if self.config.tied else None)
