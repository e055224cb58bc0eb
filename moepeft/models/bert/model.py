# SPDX-License-Identifier: Apache-2.0
"""BERT (Devlin et al., arXiv:1810.04805): an encoder with post-norms.

The module `bert.weights` maps weights to their names in other formats.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax import struct

from moepeft.core.types import Array, Batch, Context
from moepeft.models import config_fields
from moepeft.models.sites import ATTENTION, context, feed_forward
from moepeft.models.transformer import Transformer
from moepeft.nn.adapter_hook import AdapterMap, SublayerHook
from moepeft.nn.attention import Attention, attention_mask, check_implementation
from moepeft.nn.linear import Embedding, Head, Linear
from moepeft.nn.mlp import ACTIVATIONS, Mlp
from moepeft.nn.norms import NormForm


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Sizes and options of a BERT model.

  Attributes:
    length: the number of learned positions.
    types: the number of token types.
    activation: a key of `nn.mlp.ACTIVATIONS`, for feed-forward and head.
    pooler: whether there is a pooler, tanh(W x + b) of a row's first token.
    masked: whether there is a masked language modeling head.
    tied: whether that head is the transpose of the embedding.
  """

  vocab: int = 30522
  d_model: int = 768
  heads: int = 12
  ffn: int = 3072
  layers: int = 12
  length: int = 512
  types: int = 2
  activation: str = 'gelu_exact'
  pooler: bool = True
  masked: bool = False
  tied: bool = True
  eps: float = 1e-12
  dropout: float = 0.1
  family: ClassVar[str] = 'bert'

  def __post_init__(self):
    config_fields.check(self, _MINIMUMS)
    config_fields.check_one_of('activation', self.activation, ACTIVATIONS)
    if self.d_model % self.heads:
      raise ValueError(
        f'heads is a divisor of d_model={self.d_model}; got {self.heads}'
      )

  @property
  def head_dim(self) -> int:
    return self.d_model // self.heads

  @property
  def norm_form(self) -> NormForm:
    return NormForm(self.eps, centred=True)


_COUNTS = ('vocab', 'd_model', 'heads', 'ffn', 'layers', 'length', 'types')
_MINIMUMS = dict.fromkeys(_COUNTS, 1) | {'eps': 0, 'dropout': 0}


def _bert(d_model: int, heads: int, layers: int) -> BertConfig:
  return BertConfig(
    d_model=d_model, heads=heads, ffn=4 * d_model, layers=layers
  )


# From the config.json of the uncased models; 'tiny' is for byte tokenizers.
SIZES = {
  'tiny': dataclasses.replace(_bert(128, 4, 4), vocab=259),
  'minilm-l6': _bert(384, 12, 6),
  'base': _bert(768, 12, 12),
  'large': _bert(1024, 16, 24),
}


def sites(config: BertConfig) -> dict[str, str]:
  """Maps the path of each adapter site to its role."""
  mlp = feed_forward(gated=False)
  roles = {'embed': 'embed', 'embed_norm': 'norm'}
  roles |= {f'encoder/self{part}': role for part, role in ATTENTION.items()}
  roles |= {f'encoder/mlp{part}': role for part, role in mlp.items()}
  if config.pooler:
    roles['pooler'] = 'pooler'
  if config.masked:
    roles |= {'transform': 'transform', 'transform_norm': 'norm'}
    roles['head'] = 'head'
  return roles


class BertBlock(Transformer):
  """One layer: self-attention and feed-forward, each with a post-norm."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: Array, ctx: Context, mask: Array) -> Array:
    c = self.config
    attention = Attention(
      c.d_model,
      c.heads,
      c.head_dim,
      'encoder/self',
      self.adapter_map,
      scale=c.head_dim**-0.5,
      dropout=c.dropout,
      norm_form=c.norm_form,
      bias=True,
      implementation=self.attention,
      name='self',
      **self.dtypes,
    )
    run = lambda attention, y: attention(y, ctx, mask=mask)  # noqa: E731
    x = self._post_norm_residual('self', attention, run, x, ctx)
    mlp = Mlp(
      c.d_model,
      c.ffn,
      False,
      c.activation,
      'encoder/mlp',
      self.adapter_map,
      norm_form=c.norm_form,
      bias=True,
      name='mlp',
      **self.dtypes,
    )
    return self._post_norm_residual(
      'mlp', mlp, lambda mlp, y: mlp(y, ctx), x, ctx
    )

  def _post_norm_residual(self, name, module, run, x, ctx):
    """norm(x + dropout(sublayer(x))); adapters may wrap the sublayer."""
    hook = SublayerHook(
      f'encoder/{name}', self.adapter_map, name=f'around_{name}'
    )
    y = hook(module, run, x, ctx)
    drop = nn.Dropout(self.config.dropout)
    return module.norm(x + drop(y, deterministic=not ctx.train), ctx)


class BertStack(Transformer):
  """All layers, from normalized embeddings to hidden states."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    block = BertBlock(**self.shared, parent=None)
    token_mask, segments = ctx.token_mask, ctx.segment_ids
    return self.scan_layers(
      block,
      self.config.layers,
      x,
      ctx,
      attention_mask(token_mask, token_mask, segments, segments),
    )


@struct.dataclass
class Encoded:
  """The outputs of an encoder.

  Attributes:
    states: [b, t, d], hidden states of the last layer.
    pooled: [b, d]; None without a pooler.
    logits: float32 [b, t, v]; None without a head.
  """

  states: Array
  pooled: Array | None = None
  logits: Array | None = None


class Bert(Transformer):
  """The encoder; `__call__` returns all outputs, `encode` hidden states."""

  config: BertConfig

  def setup(self):
    c = self.config
    check_implementation(self.attention)
    if self.attention == 'chunked':
      raise ValueError(
        "config.model.attention is 'chunked', which BERT does not support, as "
        "its attention is not causal; use 'naive' or 'fused'"
      )
    self.embed = self._embedding(c.vocab, 'embed', 'v', self.adapter_map)
    # Without adapters: the site 'embed' is the token embedding.
    self.positions = self._embedding(c.length, 'positions', 'p', AdapterMap())
    self.types = self._embedding(c.types, 'types', 'y', AdapterMap())
    self.embed_norm = c.norm_form.at(
      'embed_norm', self.adapter_map, self.param_dtype
    )
    self.drop = nn.Dropout(c.dropout)
    self.encoder = BertStack(**self.shared)
    if c.pooler:
      self.pooler = self._square('pooler')
    if c.masked:
      self.transform = self._square('transform')
      self.transform_norm = c.norm_form.at(
        'transform_norm', self.adapter_map, self.param_dtype
      )
      self.head = Head(
        c.d_model, c.vocab, self.adapter_map, bias=True, **self.dtypes
      )

  def _embedding(self, size, site, letter, adapter_map) -> Embedding:
    return Embedding(
      size,
      self.config.d_model,
      adapter_map,
      site=site,
      letter=letter,
      **self.dtypes,
      stddev=0.02,
    )

  def _square(self, site) -> Linear:
    """A projection [d, d]."""
    d = self.config.d_model
    return Linear(
      'btd,dc->btc',
      (d, d),
      site,
      self.adapter_map,
      stddev=d**-0.5,
      **self.dtypes,
      bias=True,
    )

  def __call__(self, batch: Batch, train: bool = False) -> Encoded:
    """Computes hidden states, pooled output and logits.

    Args:
      batch: `inputs` int [b, t] and, optionally, `inputs_mask` (bool, False
        on padding; default: no padding), `inputs_types` (int, default: zeros)
        and, for packed rows, `inputs_segments` and `inputs_positions` (int).
      train: enables dropout and router noise (rngs 'dropout' and 'router').
    """
    ctx = context(batch, 'inputs', batch['inputs'], train)
    states = self.encode(batch['inputs'], ctx, batch.get('inputs_types'))
    pooled = logits = None
    if self.config.pooler:
      first = ctx.replace(token_mask=ctx.token_mask[:, :1])
      pooled = jnp.tanh(self.pooler(states[:, :1], first))[:, 0]
    if self.config.masked:
      logits = self._logits(states, ctx)
    return Encoded(states, pooled, logits)

  def encode(
    self, ids: Array, ctx: Context, types: Array | None = None
  ) -> Array:
    """ids [b, t] -> hidden states [b, t, d].

    Raises:
      ValueError: rows are longer than the learned positions.
    """
    length = self.config.length
    if ids.shape[1] > length:
      raise ValueError(
        f'the model has {length} learned positions; got rows of '
        f'{ids.shape[1]} tokens: make them shorter'
      )
    if ctx.positions is None:
      positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
      ctx = ctx.replace(positions=positions)
    types = jnp.zeros_like(ids) if types is None else types
    ctx = ctx.replace(token_ids=ids)
    x = self.embed(ids, ctx) + self.types(types, ctx)
    x = self.embed_norm(x + self.positions(ctx.positions, ctx), ctx)
    return self.encoder(self.drop(x, deterministic=not ctx.train), ctx)

  def _logits(self, x: Array, ctx: Context) -> Array:
    c = self.config
    x = ACTIVATIONS[c.activation](self.transform(x, ctx))
    x = self.transform_norm(x, ctx)
    return self.head(x, ctx, self.embed if c.tied else None)
