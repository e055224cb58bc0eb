# SPDX-License-Identifier: Apache-2.0
"""The model family Llama: Llama 1 to 3.x (arXiv:2302.13971, 2307.09288,
2407.21783) and SmolLM2 (arXiv:2502.02737), which has the same architecture."""

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

_LLAMA3 = Rope(theta=500000.0)
_LLAMA31 = Rope(theta=500000.0, kind='llama3', factor=8.0, original=8192)
_LLAMA32 = dataclasses.replace(_LLAMA31, factor=32.0)
_LLAMA2 = DecoderConfig(head_dim=128, eps=1e-5, length=4096)


def _llama2(d_model, heads, kv_heads, ffn, layers) -> DecoderConfig:
  return dataclasses.replace(
    _LLAMA2,
    d_model=d_model,
    heads=heads,
    kv_heads=kv_heads,
    ffn=ffn,
    layers=layers,
  )


def _llama3(
  config: DecoderConfig, rope: Rope, **overrides: Any
) -> DecoderConfig:
  length = 8192 if rope.kind == 'default' else 131072
  return dataclasses.replace(
    config, vocab=128256, rope=rope, length=length, **overrides
  )


_SMOLLM2 = DecoderConfig(
  vocab=49152,
  tied=True,
  eps=1e-5,
  length=8192,
  rope=Rope(theta=100000.0),
)
_8B = _llama2(4096, 32, 8, 14336, 32)
_70B = _llama2(8192, 64, 8, 28672, 80)

# The values are those of each model's config.json.
SIZES = {
  'tiny': DecoderConfig(
    vocab=259, d_model=128, heads=4, kv_heads=2, head_dim=32, ffn=352, layers=4
  ),
  # The released config.json has eps 1e-6, the original code 1e-5.
  '7b': dataclasses.replace(
    _llama2(4096, 32, 32, 11008, 32), length=2048, eps=1e-6
  ),
  '2-7b': _llama2(4096, 32, 32, 11008, 32),
  '2-13b': _llama2(5120, 40, 40, 13824, 40),
  '2-70b': _llama2(8192, 64, 8, 28672, 80),
  '3-8b': _llama3(_8B, _LLAMA3),
  '3-70b': _llama3(_70B, _LLAMA3),
  '3.1-8b': _llama3(_8B, _LLAMA31),
  '3.1-70b': _llama3(_70B, _LLAMA31),
  '3.2-1b': _llama3(
    _llama2(2048, 32, 8, 8192, 16), _LLAMA32, head_dim=64, tied=True
  ),
  '3.2-3b': _llama3(_llama2(3072, 24, 8, 8192, 28), _LLAMA32, tied=True),
  'smollm2-135m': dataclasses.replace(
    _SMOLLM2, d_model=576, heads=9, kv_heads=3, ffn=1536, layers=30
  ),
  'smollm2-360m': dataclasses.replace(
    _SMOLLM2, d_model=960, heads=15, kv_heads=5, ffn=2560, layers=32
  ),
  'smollm2-1.7b': dataclasses.replace(
    _SMOLLM2,
    d_model=2048,
    heads=32,
    kv_heads=32,
    ffn=8192,
    layers=24,
    rope=Rope(theta=130000.0),
  ),
}


def from_hf(fields: Mapping[str, Any], tied: bool) -> DecoderConfig:
  """Reads a `config.json`; see `hf_config.shape_from_hf`."""
  bias = fields.get('attention_bias', False)
  return dataclasses.replace(
    shape_from_hf(fields, 'llama', tied),
    attention_bias=bias,
    out_bias=bias,
    mlp_bias=fields.get('mlp_bias', False),
  )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json`."""
  return shape_to_hf(config) | {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'attention_bias': config.attention_bias,
    'mlp_bias': config.mlp_bias,
  }


FAMILY = decoder_family(
  'Llama',
  SIZES,
  DecoderFormat(('llama',), from_hf, to_hf),
  GgufFormat(
    {'llama': 'llama'},
    gguf.llama_fields,
    gguf.NAMES.rules,
    # Mistral's files also have the architecture 'llama', but a sliding window.
    accepts=lambda metadata: not metadata.get(gguf.WINDOW),
    bias_from_tensors=True,
    interleaved_rope=True,
  ),
)
