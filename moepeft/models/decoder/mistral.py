# SPDX-License-Identifier: Apache-2.0
"""Mistral (arXiv:2310.06825): Llama with an optional sliding window."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moepeft.models.decoder import gguf
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.family import DecoderFormat, decoder_family
from moepeft.models.decoder.hf_config import (
  shape_from_hf,
  shape_to_hf,
)
from moepeft.models.family import GgufFormat
from moepeft.nn.rope import Rope

_7B = DecoderConfig(
  family='mistral',
  d_model=4096,
  heads=32,
  kv_heads=8,
  head_dim=128,
  ffn=14336,
  layers=32,
  eps=1e-5,
  length=32768,
)

# From the models' config.json.
SIZES = {
  '7b-v0.1': dataclasses.replace(_7B, window=4096),
  '7b-v0.2': dataclasses.replace(_7B, rope=Rope(theta=1e6)),
  '7b-v0.3': dataclasses.replace(_7B, vocab=32768, rope=Rope(theta=1e6)),
}


def from_hf(fields: Mapping[str, Any], tied: bool) -> DecoderConfig:
  """Reads a `config.json`; see `hf_config.shape_from_hf`."""
  # Defaults of transformers' class.
  fields = {
    'max_position_embeddings': 131072,
    'sliding_window': 4096,
    **fields,
  }
  return dataclasses.replace(
    shape_from_hf(fields, 'mistral', tied, kv_heads=8),
    window=fields.get('sliding_window') or 0,
  )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json`."""
  return shape_to_hf(config) | {
    'architectures': ['MistralForCausalLM'],
    'model_type': 'mistral',
    'sliding_window': config.window or None,
  }


def _gguf_fields(
  architecture: str, metadata: Mapping[str, Any], rope_factors: Any
) -> dict[str, Any]:
  fields = gguf.llama_fields(architecture, metadata, rope_factors)
  return fields | {
    'model_type': 'mistral',
    'sliding_window': metadata[gguf.WINDOW],
  }


FAMILY = decoder_family(
  'Mistral',
  SIZES,
  DecoderFormat(('mistral',), from_hf, to_hf),
  GgufFormat(
    {'llama': 'mistral'},
    _gguf_fields,
    gguf.NAMES.rules,
    accepts=lambda metadata: bool(metadata.get(gguf.WINDOW)),
    bias_from_tensors=True,
    interleaved_rope=True,
  ),
)
