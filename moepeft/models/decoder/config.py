# SPDX-License-Identifier: Apache-2.0
"""The config of decoder-only models."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moepeft.models import config_fields
from moepeft.nn.mlp import ACTIVATIONS
from moepeft.nn.norms import NormForm
from moepeft.nn.rope import Rope

POSITIONS = ('rope', 'learned', 'sinusoidal', 'alibi')


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and options of a decoder-only model.

  Attributes:
    family: a key of `models.FAMILIES`, which defines the weights' names.
    kv_heads: the number of key and value heads (grouped-query attention).
    gated, activation: see `nn.mlp.Mlp`.
    tied: whether the head is the transpose of the embedding.
    positions: 'rope', 'learned', 'sinusoidal' (arXiv:1706.03762) or 'alibi'
      (arXiv:2108.12409).
    length: the number of learned positions, or else the training length.
    rope: the RoPE frequencies.
    centred, eps, norm_offset: see `nn.norms.NormForm`.
    post_norms: whether sublayer outputs are normalized, too (Gemma 2).
    qk_norm: whether the heads of q and k are normalized (Qwen3).
    attention_bias: whether q, k and v have biases.
    out_bias: whether the attention output projection has a bias.
    mlp_bias: whether the feed-forward projections have biases.
    scale: the scale of attention logits; 0 for head_dim ** -0.5.
    attention_cap, logits_cap: soft caps (Gemma 2); 0 for none.
    window: the sliding window in tokens; 0 for none.
    windowed: whether each layer uses the window; () for all layers.
    scale_embedding: whether embeddings are scaled by d_model ** 0.5 (Gemma).
  """

  family: str = 'llama'
  vocab: int = 32000
  d_model: int = 512
  heads: int = 8
  kv_heads: int = 8
  head_dim: int = 64
  ffn: int = 1408
  layers: int = 8
  gated: bool = True
  activation: str = 'silu'
  tied: bool = False
  positions: str = 'rope'
  length: int = 2048
  rope: Rope = Rope()
  centred: bool = False
  eps: float = 1e-6
  norm_offset: float = 0.0
  post_norms: bool = False
  qk_norm: bool = False
  attention_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  scale: float = 0.0
  attention_cap: float = 0.0
  logits_cap: float = 0.0
  window: int = 0
  windowed: tuple[bool, ...] = ()
  scale_embedding: bool = False
  dropout: float = 0.0

  def __post_init__(self):
    config_fields.check(self, _MINIMUMS)
    _check_rope(self.rope)
    config_fields.check_one_of('activation', self.activation, ACTIVATIONS)
    config_fields.check_one_of('positions', self.positions, POSITIONS)
    if self.heads % self.kv_heads:
      raise ValueError(
        f'kv_heads divides heads; got {self.kv_heads} and {self.heads}'
      )
    if self.positions == 'rope' and self.head_dim % 2:
      raise ValueError(
        f'head_dim is even, as RoPE rotates pairs; got {self.head_dim}'
      )
    if self.positions == 'sinusoidal' and self.d_model % 2:
      raise ValueError(
        'd_model is even, as half of the positions are sines and half cosines; '
        f'got {self.d_model}'
      )
    self._check_windowed()

  def _check_windowed(self):
    if not all(isinstance(layer, bool) for layer in self.windowed):
      raise ValueError(
        f'windowed is True or False for each layer; got {self.windowed!r}'
      )
    if self.windowed and len(self.windowed) != self.layers:
      raise ValueError(
        f'windowed has a value for each of the {self.layers} layers; got '
        f'{len(self.windowed)}'
      )

  @property
  def norm_form(self) -> NormForm:
    return NormForm(self.eps, self.centred, self.norm_offset)


# The minimum value of each field that has a lower bound.
_MINIMUMS = {
  **dict.fromkeys(
    (
      'vocab',
      'd_model',
      'heads',
      'kv_heads',
      'head_dim',
      'ffn',
      'layers',
      'length',
    ),
    1,
  ),
  **dict.fromkeys(
    ('eps', 'scale', 'attention_cap', 'logits_cap', 'window', 'dropout'), 0
  ),
}


# YaRN computes logarithms of `fast`, `slow` and `theta`.
_ROPE_MINIMUMS = {
  'theta': 1,
  'factor': 0.1,
  'original': 1,
  'low': 0,
  'high': 0,
  'fast': 1e-3,
  'slow': 1e-3,
  'attention': 0,
}


def _check_rope(rope: Rope) -> None:
  config_fields.check(rope, _ROPE_MINIMUMS, 'rope.')
  if rope.kind == 'yarn' and rope.theta <= 1:
    raise ValueError(f'rope.theta is above 1 for yarn; got {rope.theta}')
  if rope.kind == 'llama3' and rope.high <= rope.low:
    raise ValueError(
      f'rope.high is above rope.low for llama3; got {rope.high} and {rope.low}'
    )


def from_fields(fields: Mapping[str, Any]) -> DecoderConfig:
  """Makes a config from its `dataclasses.asdict`, which may be from JSON.

  Raises:
    ValueError: a field is unknown or invalid; the message starts with its
      name.
  """
  config_fields.check_names(DecoderConfig, fields)
  values = dict(fields)
  if 'rope' in values:
    values['rope'] = _rope(values['rope'])
  if 'windowed' in values:
    windowed = values['windowed']
    if not isinstance(windowed, (tuple, list)):
      raise ValueError(
        f'windowed is a list, True or False for each layer; got {windowed!r}'
      )
    values['windowed'] = tuple(windowed)
  return DecoderConfig(**values)


def _rope(value: Any) -> Rope:
  if isinstance(value, Rope):
    return value
  if not isinstance(value, Mapping):
    raise ValueError(
      "rope is a mapping like {'kind': 'linear', 'factor': 2.0}; got "
      f'{value!r}'
    )
  config_fields.check_names(Rope, value, 'rope.')
  return Rope(**value)
