# SPDX-License-Identifier: Apache-2.0
"""Gemma 1 and 2 (arXiv:2403.08295, 2408.00118).

Both have scaled embeddings and norms that store scale - 1. Gemma 2 adds norms
after sublayers, soft caps and sliding windows.
"""

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
from moepeft.models.hf_fields import NUMBER, POSITIVE, SWITCH
from moepeft.models.weight_mapping import CheckpointError

_SIZE = DecoderConfig(
  family='gemma',
  vocab=256000,
  head_dim=256,
  activation='gelu',
  tied=True,
  length=8192,
  norm_offset=1.0,
  scale_embedding=True,
)
_SIZE_2 = dataclasses.replace(
  _SIZE,
  post_norms=True,
  attention_cap=50.0,
  logits_cap=30.0,
  window=4096,
)


def _gemma2(d_model, heads, kv_heads, ffn, layers) -> DecoderConfig:
  return dataclasses.replace(
    _SIZE_2,
    d_model=d_model,
    heads=heads,
    kv_heads=kv_heads,
    ffn=ffn,
    layers=layers,
    windowed=_alternating(layers),
  )


def _alternating(layers: int) -> tuple[bool, ...]:
  """Layers alternate: the first has a window, the second full attention."""
  return tuple(layer % 2 == 0 for layer in range(layers))


_HF_DEFAULTS = {
  'max_position_embeddings': 8192,
  'sliding_window': 4096,
  'attn_logit_softcapping': 50.0,
  'final_logit_softcapping': 30.0,
}

# From the models' config.json.
SIZES = {
  '2b': dataclasses.replace(
    _SIZE, d_model=2048, heads=8, kv_heads=1, ffn=16384, layers=18
  ),
  '7b': dataclasses.replace(
    _SIZE, d_model=3072, heads=16, kv_heads=16, ffn=24576, layers=28
  ),
  '2-2b': _gemma2(2304, 8, 4, 9216, 26),
  '2-9b': _gemma2(3584, 16, 8, 14336, 42),
  # Its attention scale is (d_model / heads) ** -0.5.
  '2-27b': dataclasses.replace(
    _gemma2(4608, 32, 16, 36864, 46), head_dim=128, scale=144**-0.5
  ),
}


def from_hf(fields: Mapping[str, Any], tied: bool) -> DecoderConfig:
  """Reads a `config.json`; see `hf_config.shape_from_hf`."""
  if fields.get('use_bidirectional_attention'):
    raise CheckpointError(
      'config.json has use_bidirectional_attention: expected a Gemma that '
      'generates text; encoders are not supported'
    )
  # Defaults of transformers' class.
  fields = _HF_DEFAULTS | fields
  is_gemma2 = fields['model_type'] == 'gemma2'
  # Each class reads one of the two names and ignores the other.
  activation = fields.get('hidden_activation' if is_gemma2 else 'hidden_act')
  if activation is None or (not is_gemma2 and activation == 'gelu'):
    # 'gelu' in Gemma 1's files is the tanh approximation.
    activation = 'gelu_pytorch_tanh'
  shape = shape_from_hf(
    {**fields, 'hidden_activation': activation},
    'gemma',
    tied,
    kv_heads=4 if is_gemma2 else 16,
  )
  bias = fields.get('attention_bias', False)
  shape = dataclasses.replace(
    shape,
    head_dim=fields.get('head_dim') or 256,
    norm_offset=1.0,
    scale_embedding=True,
    attention_bias=bias,
    out_bias=bias,
  )
  if not is_gemma2:
    return shape
  return dataclasses.replace(
    shape,
    post_norms=True,
    scale=(fields.get('query_pre_attn_scalar') or 256) ** -0.5,
    attention_cap=fields['attn_logit_softcapping'] or 0.0,
    logits_cap=fields['final_logit_softcapping'] or 0.0,
    **windows_from_hf(
      {'use_sliding_window': True, **fields}, _alternating(shape.layers)
    ),
  )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json`."""
  fields = shape_to_hf(config)
  fields |= {
    'hidden_activation': fields['hidden_act'],
    'architectures': ['GemmaForCausalLM'],
    'model_type': 'gemma',
    'attention_bias': config.attention_bias,
  }
  if not config.post_norms:
    return fields
  scale = config.scale or config.head_dim**-0.5
  fields |= windows_to_hf(config) | {
    'architectures': ['Gemma2ForCausalLM'],
    'model_type': 'gemma2',
    'query_pre_attn_scalar': round(scale**-2),
    'attn_logit_softcapping': config.attention_cap or None,
    'final_logit_softcapping': config.logits_cap or None,
  }
  del fields['use_sliding_window']
  return fields


def _gguf_fields(
  architecture: str, metadata: Mapping[str, Any], rope_factors: Any
) -> dict[str, Any]:
  fields = gguf.llama_fields(architecture, metadata, rope_factors)
  if architecture == 'gemma':
    return fields
  # The file lacks the scale; llama.cpp also detects 27B by its depth.
  of_27b = fields['hidden_size'] // fields['num_attention_heads']
  is_27b = fields['num_hidden_layers'] == 46
  return fields | {
    'query_pre_attn_scalar': of_27b if is_27b else fields['head_dim'],
    'sliding_window': metadata.get(gguf.WINDOW, 4096),
    'attn_logit_softcapping': metadata.get('attn_logit_softcapping', 50.0),
    'final_logit_softcapping': metadata.get('final_logit_softcapping', 30.0),
  }


FAMILY = decoder_family(
  'Gemma',
  SIZES,
  DecoderFormat(
    ('gemma', 'gemma2'),
    from_hf,
    to_hf,
    tied=True,
    field_types={
      'query_pre_attn_scalar': POSITIVE,
      'attn_logit_softcapping': NUMBER,
      'final_logit_softcapping': NUMBER,
      'use_bidirectional_attention': SWITCH,
    },
  ),
  GgufFormat(
    {'gemma': 'gemma', 'gemma2': 'gemma2'},
    _gguf_fields,
    gguf.NAMES.rules,
    bias_from_tensors=True,
  ),
)
