# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and 2.5 (arXiv:2407.10671, 2412.15115): biases of q, k and v."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moepeft.models.decoder import gguf
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.family import DecoderFormat, decoder_family
from moepeft.models.decoder.hf_config import (
  shape_from_hf,
  shape_to_hf,
  windows_from_hf,
  windows_to_hf,
)
from moepeft.models.family import GgufFormat
from moepeft.nn.rope import Rope

_SIZE = DecoderConfig(
  family='qwen2',
  vocab=151936,
  attention_bias=True,
  tied=True,
  length=32768,
  rope=Rope(theta=1e6),
)

# The base models of Qwen2.5, from their config.json.
SIZES = {
  '2.5-0.5b': dataclasses.replace(
    _SIZE, d_model=896, heads=14, kv_heads=2, ffn=4864, layers=24
  ),
  '2.5-1.5b': dataclasses.replace(
    _SIZE,
    d_model=1536,
    heads=12,
    kv_heads=2,
    head_dim=128,
    ffn=8960,
    layers=28,
    length=131072,
  ),
  '2.5-3b': dataclasses.replace(
    _SIZE,
    d_model=2048,
    heads=16,
    kv_heads=2,
    head_dim=128,
    ffn=11008,
    layers=36,
  ),
  '2.5-7b': dataclasses.replace(
    _SIZE,
    vocab=152064,
    d_model=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    ffn=18944,
    layers=28,
    length=131072,
    tied=False,
  ),
}


def shape_by_depth(
  fields: Mapping[str, Any], family: str, tied: bool
) -> DecoderConfig:
  """Reads a `config.json` of Qwen 2 or 3; see `hf_config.shape_from_hf`.

  Layers before `max_window_layers` have full attention.
  """
  # Defaults of transformers' classes.
  fields = {
    'max_position_embeddings': 32768,
    'sliding_window': 4096,
    **fields,
  }
  shape = shape_from_hf(fields, family, tied, kv_heads=32)
  first_windowed = fields.get('max_window_layers')
  first_windowed = 28 if first_windowed is None else first_windowed
  windowed = tuple(layer >= first_windowed for layer in range(shape.layers))
  return dataclasses.replace(shape, **windows_from_hf(fields, windowed))


def from_hf(fields: Mapping[str, Any], tied: bool) -> DecoderConfig:
  """Reads a `config.json`."""
  shape = shape_by_depth(fields, 'qwen2', tied)
  return dataclasses.replace(shape, attention_bias=True)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json`."""
  return (
    shape_to_hf(config)
    | windows_to_hf(config)
    | {'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2'}
  )


FAMILY = decoder_family(
  'Qwen2',
  SIZES,
  DecoderFormat(('qwen2',), from_hf, to_hf),
  GgufFormat({'qwen2': 'qwen2'}, gguf.llama_fields, gguf.NAMES.rules),
)
