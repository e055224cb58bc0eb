# SPDX-License-Identifier: Apache-2.0
"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask
Learners"): learned positions, LayerNorm, biases, a fused array of q, k, v."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moepeft.models.decoder import gguf
from moepeft.models.decoder.arrays import DecoderNames
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.family import DecoderFormat, decoder_family
from moepeft.models.decoder.hf_config import (
  activation_from_hf,
  activation_to_hf,
)
from moepeft.models.family import GgufFormat
from moepeft.models.hf_fields import SIZE, SWITCH, TEXT
from moepeft.models.weight_mapping import CheckpointError

NAMES = DecoderNames(
  layer='transformer.h.{l}.',
  modules={
    **dict.fromkeys(('self/q', 'self/k', 'self/v'), 'attn.c_attn'),
    'self/o': 'attn.c_proj',
    'mlp/wi': 'mlp.c_fc',
    'mlp/wo': 'mlp.c_proj',
  },
  norms={'self/norm': 'ln_1', 'mlp/norm': 'ln_2'},
  embedding='transformer.wte',
  positions='transformer.wpe',
  norm='transformer.ln_f',
  head='lm_head',
  kernel_axes='in out',
  prefix='transformer.',
  # The causal mask in older files.
  ignored=r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',
)
_SIZE = DecoderConfig(
  family='gpt2',
  vocab=50257,
  gated=False,
  activation='gelu',
  tied=True,
  positions='learned',
  length=1024,
  centred=True,
  eps=1e-5,
  attention_bias=True,
  out_bias=True,
  mlp_bias=True,
)


def _gpt2(d_model, heads, layers) -> DecoderConfig:
  return dataclasses.replace(
    _SIZE,
    d_model=d_model,
    heads=heads,
    kv_heads=heads,
    ffn=4 * d_model,
    layers=layers,
  )


# From the models' config.json; 'tiny' is for byte tokenizers.
SIZES = {
  'tiny': dataclasses.replace(
    _gpt2(128, 4, 4), vocab=259, head_dim=32, length=512
  ),
  'small': _gpt2(768, 12, 12),
  'medium': _gpt2(1024, 16, 24),
  'large': _gpt2(1280, 20, 36),
  'xl': _gpt2(1600, 25, 48),
}


def from_hf(fields: Mapping[str, Any], tied: bool) -> DecoderConfig:
  """Reads a `config.json`.

  Raises:
    CheckpointError: a size is missing, or an option is not supported.
  """
  required = ('vocab_size', 'n_embd', 'n_head', 'n_layer')
  missing = [key for key in required if fields.get(key) is None]
  if missing:
    raise CheckpointError(
      f'config.json lacks {", ".join(missing)}: expected the config of a gpt2 '
      'model; write it again with save_pretrained'
    )
  for key in ('scale_attn_by_inverse_layer_idx', 'add_cross_attention'):
    if fields.get(key):
      raise CheckpointError(
        f'config.json has {key}, which is not supported: use a GPT-2 without it'
      )
  d_model, heads = fields['n_embd'], fields['n_head']
  return dataclasses.replace(
    _SIZE,
    vocab=fields['vocab_size'],
    d_model=d_model,
    heads=heads,
    kv_heads=heads,
    head_dim=d_model // heads,
    ffn=fields.get('n_inner') or 4 * d_model,
    layers=fields['n_layer'],
    activation=activation_from_hf(
      fields.get('activation_function', 'gelu_new')
    ),
    tied=tied,
    length=fields.get('n_positions', 1024),
    eps=fields.get('layer_norm_epsilon', 1e-5),
    scale=0.0 if fields.get('scale_attn_weights', True) else 1.0,
  )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json`."""
  return {
    'architectures': ['GPT2LMHeadModel'],
    'model_type': 'gpt2',
    'vocab_size': config.vocab,
    'n_embd': config.d_model,
    'n_head': config.heads,
    'n_inner': config.ffn,
    'n_layer': config.layers,
    'n_positions': config.length,
    # An older name, which llama.cpp's converter reads.
    'n_ctx': config.length,
    'activation_function': activation_to_hf(config),
    'layer_norm_epsilon': config.eps,
    'scale_attn_weights': config.scale != 1.0,
    'tie_word_embeddings': config.tied,
  }


def _gguf_fields(
  architecture: str, metadata: Mapping[str, Any], rope_factors: Any
) -> dict[str, Any]:
  del rope_factors
  return {
    'model_type': architecture,
    'n_embd': metadata['embedding_length'],
    'n_head': metadata['attention.head_count'],
    'n_layer': metadata['block_count'],
    'n_positions': metadata['context_length'],
    'n_inner': metadata['feed_forward_length'],
    'layer_norm_epsilon': metadata['attention.layer_norm_epsilon'],
  }


_SIZE_FIELDS = ('n_embd', 'n_head', 'n_layer', 'n_inner', 'n_positions')
_SWITCHES = ('scale_attn_weights', 'scale_attn_by_inverse_layer_idx')

FAMILY = decoder_family(
  'GPT-2',
  SIZES,
  DecoderFormat(
    ('gpt2',),
    from_hf,
    to_hf,
    tied=True,
    names=NAMES,
    field_types={
      **dict.fromkeys(_SIZE_FIELDS, SIZE),
      **dict.fromkeys(_SWITCHES, SWITCH),
      'activation_function': TEXT,
    },
    aliases={
      'hidden_size': 'n_embd',
      'max_position_embeddings': 'n_positions',
      'num_attention_heads': 'n_head',
      'num_hidden_layers': 'n_layer',
    },
  ),
  GgufFormat({'gpt2': 'gpt2'}, _gguf_fields, gguf.JOINED_QKV_NAMES.rules),
)
