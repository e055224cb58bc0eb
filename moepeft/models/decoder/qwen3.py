# SPDX-License-Identifier: Apache-2.0
"""Qwen3 (arXiv:2505.09388): norms of q and k heads, no biases."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moepeft.models.decoder import gguf
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.family import DecoderFormat, decoder_family
from moepeft.models.decoder.hf_config import (
  shape_to_hf,
  windows_to_hf,
)
from moepeft.models.decoder.qwen2 import shape_by_depth
from moepeft.models.family import GgufFormat
from moepeft.nn.rope import Rope

_SIZE = DecoderConfig(
  family='qwen3',
  vocab=151936,
  kv_heads=8,
  head_dim=128,
  qk_norm=True,
  tied=True,
  length=40960,
  rope=Rope(theta=1e6),
)

# From the models' config.json.
SIZES = {
  '0.6b': dataclasses.replace(
    _SIZE, d_model=1024, heads=16, ffn=3072, layers=28
  ),
  '1.7b': dataclasses.replace(
    _SIZE, d_model=2048, heads=16, ffn=6144, layers=28
  ),
  '4b': dataclasses.replace(_SIZE, d_model=2560, heads=32, ffn=9728, layers=36),
  '8b': dataclasses.replace(
    _SIZE, d_model=4096, heads=32, ffn=12288, layers=36, tied=False
  ),
}


def from_hf(fields: Mapping[str, Any], tied: bool) -> DecoderConfig:
  """Reads a `config.json`."""
  bias = fields.get('attention_bias', False)
  return dataclasses.replace(
    shape_by_depth(fields, 'qwen3', tied),
    head_dim=fields.get('head_dim') or 128,
    qk_norm=True,
    attention_bias=bias,
    out_bias=bias,
  )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json`."""
  return (
    shape_to_hf(config)
    | windows_to_hf(config)
    | {
      'architectures': ['Qwen3ForCausalLM'],
      'model_type': 'qwen3',
      'attention_bias': config.attention_bias,
    }
  )


FAMILY = decoder_family(
  'Qwen3',
  SIZES,
  DecoderFormat(('qwen3',), from_hf, to_hf),
  GgufFormat(
    {'qwen3': 'qwen3'},
    gguf.llama_fields,
    gguf.NAMES.rules,
    bias_from_tensors=True,
  ),
)
