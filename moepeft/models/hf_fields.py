# SPDX-License-Identifier: Apache-2.0
"""The content of a Hugging Face `config.json`, its types and ranges checked.

The families' readers (`models/*_names.py`, `models/llama_form.py`) compute
with these fields, so a text in the place of a number, or a size of zero, is
refused here, before them.
"""

import math
from collections.abc import Mapping
from typing import Any

from moepeft.core import untrusted

# The fields that any family reads, by their type. Sizes are at least 1, other
# integers at least 0.
_SIZES = """
  vocab_size hidden_size intermediate_size num_hidden_layers
  num_attention_heads num_key_value_heads head_dim max_position_embeddings
  original_max_position_embeddings type_vocab_size n_embd n_head n_layer
  n_inner n_positions d_model d_kv d_ff num_layers num_decoder_layers num_heads
  relative_attention_num_buckets relative_attention_max_distance
"""
_INTEGERS = 'sliding_window max_window_layers decoder_start_token_id'
_POSITIVE = """
  query_pre_attn_scalar rope_theta partial_rotary_factor factor
  low_freq_factor high_freq_factor
"""
_NUMBERS = """
  rms_norm_eps layer_norm_epsilon layer_norm_eps dropout_rate
  hidden_dropout_prob attn_logit_softcapping final_logit_softcapping beta_fast
  beta_slow attention_factor mscale mscale_all_dim
"""
_TEXTS = """
  model_type transformers_version feed_forward_proj activation_function
  hidden_act hidden_activation position_embedding_type rope_type type
"""
_SWITCHES = """
  tie_word_embeddings scale_decoder_outputs attention_bias mlp_bias
  use_sliding_window use_bidirectional_attention scale_attn_weights
  scale_attn_by_inverse_layer_idx add_cross_attention is_decoder truncate
"""
_ROPE = ('rope_scaling', 'rope_parameters')
KINDS: dict[str, type] = {
  **dict.fromkeys(_SIZES.split() + _INTEGERS.split(), int),
  **dict.fromkeys(_POSITIVE.split() + _NUMBERS.split(), float),
  **dict.fromkeys(_TEXTS.split(), str),
  **dict.fromkeys(_SWITCHES.split(), bool),
  **dict.fromkeys(_ROPE, dict),
  'layer_types': list,
}
_LEAST = {
  **dict.fromkeys(_SIZES.split(), 1),
  **dict.fromkeys(_INTEGERS.split() + _NUMBERS.split(), 0),
}
# Other names of the sizes, which transformers' classes accept (attribute_map).
_ALIASES = {
  'gpt2': {
    'hidden_size': 'n_embd',
    'max_position_embeddings': 'n_positions',
    'num_attention_heads': 'n_head',
    'num_hidden_layers': 'n_layer',
  },
  **dict.fromkeys(
    ('t5', 'mt5'),
    {
      'hidden_size': 'd_model',
      'num_attention_heads': 'num_heads',
      'num_hidden_layers': 'num_layers',
      'head_dim': 'd_kv',
    },
  ),
}


def named(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The fields with each size under the name that its family reads."""
  aliases = _ALIASES.get(fields.get('model_type'), {})
  known = {
    name: fields[alias]
    for alias, name in aliases.items()
    if fields.get(alias) is not None
  }
  return known | dict(fields)


def check(fields: Mapping[str, Any]) -> None:
  """
  Raises:
    ValueError: a known field is of another type or outside of its range; the
      message names it.
  """
  for name, kind in KINDS.items():
    value = untrusted.field(fields, name, kind, None)
    if value is None:
      continue
    if kind is float and not math.isfinite(value):
      raise ValueError(f'expected a finite number in {name!r}, got {value}')
    if name in _LEAST and value < _LEAST[name]:
      raise ValueError(
        f'expected at least {_LEAST[name]} in {name!r}, got {value}'
      )
    if name in _POSITIVE.split() and value <= 0:
      raise ValueError(f'expected a number above 0 in {name!r}, got {value}')
  for name in _ROPE:
    if fields.get(name):
      check(fields[name])
  kinds = fields.get('layer_types') or ()
  if not all(isinstance(kind, str) for kind in kinds):
    raise ValueError("expected a list of texts in 'layer_types'")
