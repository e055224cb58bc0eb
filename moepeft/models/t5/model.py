# SPDX-License-Identifier: Apache-2.0
"""Configurations and Flax modules of T5 1.0, 1.1, LM-adapted T5 and FLAN-T5.

Raffel et al., arXiv:1910.10683. `released_checkpoints.md` in the repository
google-research/text-to-text-transfer-transformer describes version 1.1. The
module `t5.weights` maps weights to their names in other formats.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import suggestion
from moepeft.core.types import Array, Batch, Context
from moepeft.models import config_fields
from moepeft.models.sites import ATTENTION, context, feed_forward
from moepeft.models.transformer import Transformer
from moepeft.nn.adapter_hook import SublayerHook
from moepeft.nn.attention import Attention, attention_mask, check_implementation
from moepeft.nn.linear import Embedding, Head
from moepeft.nn.mlp import ACTIVATIONS, Mlp
from moepeft.nn.norms import NormForm, RMSNorm
from moepeft.nn.positions import RelativeBias


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes and options of a T5 model.

  Attributes:
    gated: whether the feed-forward layer computes act(wi_0 x) * (wi_1 x), as in
      version 1.1, or act(wi x), as in 1.0.
    activation: 'gelu' (the tanh approximation) or 'relu'.
    tied: whether the output head is the transpose of the embedding.
    scale_head: whether the head's input is scaled by d_model ** -0.5.
    buckets: number of buckets of the relative position bias.
    max_distance: distance from which all positions share the last bucket.
  """

  vocab: int = 32128
  d_model: int = 512
  heads: int = 6
  head_dim: int = 64
  ffn: int = 1024
  encoder_layers: int = 8
  decoder_layers: int = 8
  gated: bool = True
  activation: str = 'gelu'
  tied: bool = False
  scale_head: bool = False
  buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6
  dropout: float = 0.1
  family: ClassVar[str] = 't5'

  def __post_init__(self):
    config_fields.check(self, _MINIMUMS)
    config_fields.check_one_of('activation', self.activation, ACTIVATIONS)


# The minimum value of each field that has a lower bound. The bidirectional
# relative position bias needs two buckets per direction, and a maximum distance
# above that of the buckets that hold a single distance.
_MINIMUMS = {
  **dict.fromkeys(
    (
      'vocab',
      'd_model',
      'heads',
      'head_dim',
      'ffn',
      'encoder_layers',
      'decoder_layers',
    ),
    1,
  ),
  'buckets': 4,
  'max_distance': 2,
  'eps': 0,
  'dropout': 0,
}


# (layers, heads, head size, d_model, ffn) of version 1.1. The sizes are from
# released_checkpoints.md, except tiny, a size for tests.
_SIZES = {
  'tiny': (1, 2, 16, 32, 128),
  'small': (8, 6, 64, 512, 1024),
  'base': (12, 12, 64, 768, 2048),
  'large': (24, 16, 64, 1024, 2816),
  'xl': (24, 32, 64, 2048, 5120),
  'xxl': (24, 64, 64, 4096, 10240),
}
# The sizes of version 1.0. Its xl and xxl were released as 3B and 11B.
_SIZES_1_0 = {
  'tiny': (1, 2, 16, 32, 128),
  'small': (6, 8, 64, 512, 2048),
  'base': (12, 12, 64, 768, 3072),
  'large': (24, 16, 64, 1024, 4096),
  'xl': (24, 32, 128, 1024, 16384),
  'xxl': (24, 128, 128, 1024, 65536),
}


def config(size: str, version: str = '1.1') -> T5Config:
  """Returns the configuration of a released model.

  Args:
    size: tiny, small, base, large, xl or xxl.
    version: '1.0', or '1.1' (also LM-adapted and FLAN).

  Raises:
    ValueError: there is no such size or version.
  """
  table = {'1.0': _SIZES_1_0, '1.1': _SIZES}.get(version)
  if table is None:
    raise ValueError(f"T5's version is '1.0' or '1.1'; got {version!r}")
  if size not in table:
    raise ValueError(
      f'T5 comes as {", ".join(table)}; got {size!r}{suggestion(size, table)}'
    )
  layers, heads, head_dim, d_model, ffn = table[size]
  is_v1_1 = version == '1.1'
  return T5Config(
    d_model=d_model,
    heads=heads,
    head_dim=head_dim,
    ffn=ffn,
    encoder_layers=layers,
    decoder_layers=layers,
    gated=is_v1_1,
    activation='gelu' if is_v1_1 else 'relu',
    tied=not is_v1_1,
    scale_head=not is_v1_1,
  )


# Configurations of version 1.1.
SIZES = {size: config(size) for size in _SIZES}


def sites(config: T5Config) -> dict[str, str]:
  """Maps the path of each adapter site to its role.

  Adapter methods select their default sites by role.
  """
  mlp = feed_forward(config.gated)
  stacks = {
    'encoder/self': ATTENTION,
    'encoder/mlp': mlp,
    'decoder/self': ATTENTION,
    'decoder/cross': ATTENTION,
    'decoder/mlp': mlp,
  }
  roles = {'embed': 'embed'}
  for path, suffixes in stacks.items():
    roles |= {path + suffix: role for suffix, role in suffixes.items()}
  outer = {'encoder/norm': 'norm', 'decoder/norm': 'norm', 'head': 'head'}
  return roles | outer


class T5Block(Transformer):
  """One layer: self-attention, cross-attention in a decoder, feed-forward."""

  config: T5Config
  side: str = 'encoder'

  @nn.compact
  def __call__(self, x, ctx, bias, mask, source, source_ctx, source_mask):
    x = self._attend('self', x, ctx, bias, mask)
    if source is not None:
      x = self._attend('cross', x, ctx, None, source_mask, source, source_ctx)
    c = self.config
    mlp = Mlp(
      c.d_model,
      c.ffn,
      c.gated,
      c.activation,
      f'{self.side}/mlp',
      self.adapter_map,
      dropout=c.dropout,
      norm_form=NormForm(c.eps),
      **self.dtypes,
      name='mlp',
    )
    return self._residual('mlp', mlp, lambda mlp, y: mlp(y, ctx), x, ctx)

  def _attend(self, name, x, ctx, *args):
    c = self.config
    attention = Attention(
      c.d_model,
      c.heads,
      c.head_dim,
      f'{self.side}/{name}',
      self.adapter_map,
      dropout=c.dropout,
      norm_form=NormForm(c.eps),
      q_stddev=(c.d_model * c.head_dim) ** -0.5,
      **self.dtypes,
      implementation=self.attention,
      name=name,
    )
    run = lambda attention, y: attention(y, ctx, *args)  # noqa: E731
    return self._residual(name, attention, run, x, ctx)

  def _residual(self, name, module, run, x, ctx):
    """x + dropout(sublayer(norm(x))); adapters may wrap the sublayer."""
    hook = SublayerHook(
      f'{self.side}/{name}', self.adapter_map, name=f'around_{name}'
    )
    y = hook(module, run, module.norm(x, ctx), ctx)
    dropout = nn.Dropout(self.config.dropout, broadcast_dims=(1,))
    return x + dropout(y, deterministic=not ctx.train)


class T5Stack(Transformer):
  """The encoder or the decoder: embeddings to normalized hidden states."""

  config: T5Config
  side: str = 'encoder'

  @nn.compact
  def __call__(
    self, x, ctx, mask, source=None, source_ctx=None, source_mask=None
  ):
    c = self.config
    dropout = nn.Dropout(c.dropout, broadcast_dims=(1,))
    relpos = RelativeBias(
      c.heads,
      c.buckets,
      c.max_distance,
      bidirectional=self.side == 'encoder',
      stddev=c.d_model**-0.5,
      **self.dtypes,
      name='relpos',
    )
    if ctx.decode:
      queries, keys = ctx.index[None], jnp.arange(ctx.cache_length)
    else:
      queries = keys = jnp.arange(x.shape[1])
    block = T5Block(**self.shared, side=self.side, parent=None)
    layers = {'encoder': c.encoder_layers, 'decoder': c.decoder_layers}
    x = self.scan_layers(
      block,
      layers[self.side],
      dropout(x, deterministic=not ctx.train),
      ctx,
      relpos(queries, keys),
      mask,
      source,
      source_ctx,
      source_mask,
    )
    norm = RMSNorm(
      f'{self.side}/norm',
      self.adapter_map,
      c.eps,
      self.param_dtype,
      name='norm',
    )
    return dropout(norm(x, ctx), deterministic=not ctx.train)


class T5(Transformer):
  """The encoder-decoder model.

  Training uses `__call__`; generation uses `encode` and `decode`. The attention
  implementation 'chunked' is not supported.
  """

  config: T5Config

  def setup(self):
    c = self.config
    check_implementation(self.attention)
    if self.attention == 'chunked':
      raise ValueError(
        "config.model.attention is 'chunked', which T5 does not support: its "
        'relative position bias is an array of queries x keys; take '
        "'naive' or 'fused'"
      )
    self.embed = Embedding(
      c.vocab,
      c.d_model,
      self.adapter_map,
      **self.dtypes,
    )
    self.encoder = T5Stack(**self.shared, side='encoder')
    self.decoder = T5Stack(**self.shared, side='decoder')
    self.head = Head(
      c.d_model,
      c.vocab,
      self.adapter_map,
      **self.dtypes,
    )

  def __call__(self, batch: Batch, train: bool = False) -> Array:
    """Computes the logits of a batch, float32 [b, t, v].

    Args:
      batch: `inputs` int [b, s], `decoder_inputs` int [b, t] and, optionally,
        `inputs_mask`, `targets_mask` (bool; default: no padding) and
        `inputs_segments`, `targets_segments` (int, packed rows).
      train: enables dropout and router noise (rngs 'dropout' and 'router').
    """
    source_ctx = context(batch, 'inputs', batch['inputs'], train)
    encoded = self.encode(batch['inputs'], source_ctx)
    ctx = context(batch, 'targets', batch['decoder_inputs'], train)
    return self.decode(batch['decoder_inputs'], ctx, encoded, source_ctx)

  def encode(self, inputs: Array, ctx: Context) -> Array:
    """ids [b, s] -> hidden states [b, s, d]."""
    ctx = ctx.replace(token_ids=inputs)
    x = self.embed(inputs, ctx)
    mask = attention_mask(
      ctx.token_mask, ctx.token_mask, ctx.segment_ids, ctx.segment_ids
    )
    return self.encoder(x, ctx, mask)

  def decode(
    self, ids: Array, ctx: Context, encoded: Array, source_ctx: Context
  ) -> Array:
    """ids [b, t] -> logits [b, t, v]; t is 1 if ctx.decode is set."""
    token_mask, segments = ctx.token_mask, ctx.segment_ids
    source_segments = source_ctx.segment_ids
    # If the inputs are not packed, every target segment attends to the complete
    # input of its row.
    source_mask = attention_mask(
      token_mask,
      source_ctx.token_mask,
      None if source_segments is None else segments,
      source_segments,
    )
    if ctx.decode:
      is_cached = jnp.arange(ctx.cache_length) <= ctx.index
      mask = is_cached[None, None, None, :]
    else:
      mask = attention_mask(
        token_mask, token_mask, segments, segments, causal=True
      )
    ctx = ctx.replace(token_ids=ids)
    x = self.embed(ids, ctx)
    x = self.decoder(x, ctx, mask, encoded, source_ctx, source_mask)
    if self.config.scale_head:
      x = x * self.config.d_model**-0.5
    return self.head(x, ctx, self.embed if self.config.tied else None)
