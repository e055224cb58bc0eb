# SPDX-License-Identifier: Apache-2.0
"""Reads and writes `config.json` of families with Llama's fields.

Each family passes transformers' defaults of missing fields.
"""

from collections.abc import Mapping
from typing import Any

from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.hf_rope import rope_from_hf, rope_to_hf
from moepeft.models.weight_mapping import CheckpointError

ACTIVATIONS = {
  'silu': 'silu',
  'gelu_pytorch_tanh': 'gelu',
  'gelu_new': 'gelu',
  'gelu': 'gelu_exact',
  'relu': 'relu',
}


def shape_from_hf(
  fields: Mapping[str, Any], family: str, tied: bool, kv_heads: int = 0
) -> DecoderConfig:
  """Reads the options that all families with Llama's fields share.

  Args:
    kv_heads: the default in transformers; 0 for the number of heads.

  Raises:
    CheckpointError: a size is missing, or an option is not supported.
  """
  required = {
    'vocab': 'vocab_size',
    'd_model': 'hidden_size',
    'heads': 'num_attention_heads',
    'ffn': 'intermediate_size',
    'layers': 'num_hidden_layers',
  }
  missing = [key for key in required.values() if fields.get(key) is None]
  if missing:
    raise CheckpointError(
      f'config.json lacks {", ".join(missing)}: expected the config of a '
      f'{family} model; write it again with save_pretrained'
    )
  sizes = {field: fields[hf_field] for field, hf_field in required.items()}
  heads = sizes['heads']
  default_kv_heads = min(kv_heads, heads) or heads
  return DecoderConfig(
    family=family,
    **sizes,
    kv_heads=fields.get('num_key_value_heads', default_kv_heads) or heads,
    head_dim=fields.get('head_dim') or sizes['d_model'] // heads,
    activation=activation_from_hf(
      fields.get('hidden_activation') or fields.get('hidden_act', 'silu')
    ),
    tied=tied,
    length=fields.get('max_position_embeddings', 2048),
    rope=rope_from_hf(fields),
    eps=fields.get('rms_norm_eps', 1e-6),
  )


def shape_to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The fields of `config.json` that all families with Llama's fields share."""
  rope = rope_to_hf(config.rope)
  fields = {
    'vocab_size': config.vocab,
    'hidden_size': config.d_model,
    'num_attention_heads': config.heads,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.ffn,
    'num_hidden_layers': config.layers,
    'max_position_embeddings': config.length,
    'rms_norm_eps': config.eps,
    'hidden_act': activation_to_hf(config),
    'tie_word_embeddings': config.tied,
    'rope_parameters': rope,
    # For transformers 4.
    'rope_theta': config.rope.theta,
  }
  if config.rope.kind != 'default':
    fields['rope_scaling'] = {
      key: value for key, value in rope.items() if key != 'rope_theta'
    }
  return fields


def activation_from_hf(name: str) -> str:
  """Maps an activation of transformers to a key of `nn.mlp.ACTIVATIONS`.

  Raises:
    CheckpointError: the activation is not supported.
  """
  if name not in ACTIVATIONS:
    raise CheckpointError(
      f'the activation {name!r} in config.json: expected one of '
      f'{", ".join(ACTIVATIONS)}; others are not supported'
    )
  return ACTIVATIONS[name]


def activation_to_hf(config: DecoderConfig) -> str:
  """Hugging Face's name of the activation."""
  names = {name: hf_name for hf_name, name in reversed(ACTIVATIONS.items())}
  return names[config.activation]


def windows_from_hf(
  fields: Mapping[str, Any], default_windowed: tuple[bool, ...]
) -> dict[str, Any]:
  """`window` and `windowed` of a family whose layers differ.

  Args:
    default_windowed: whether each layer is windowed, if 'layer_types' is
      missing.
  """
  window = fields.get('sliding_window') or 0
  if not fields.get('use_sliding_window') or not window:
    return {}
  is_windowed = {'full_attention': False, 'sliding_attention': True}
  layer_types = fields.get('layer_types')
  unknown = sorted(set(layer_types or ()) - is_windowed.keys())
  if unknown:
    raise CheckpointError(
      f'layers of the type {", ".join(unknown)} in config.json: expected '
      f'{" or ".join(is_windowed)}; others are not supported'
    )
  windowed = (
    tuple(is_windowed[layer_type] for layer_type in layer_types)
    if layer_types
    else default_windowed
  )
  return {'window': window, 'windowed': windowed} if any(windowed) else {}


def windows_to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The fields that `windows_from_hf` reads."""
  windowed = config.windowed or (config.window > 0,) * config.layers
  layer_types = {False: 'full_attention', True: 'sliding_attention'}
  return {
    'sliding_window': config.window or None,
    'use_sliding_window': config.window > 0,
    'layer_types': [layer_types[layer] for layer in windowed],
  }
