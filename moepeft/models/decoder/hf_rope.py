# SPDX-License-Identifier: Apache-2.0
"""Reads and writes RoPE options in Hugging Face's `config.json`."""

import math
from collections.abc import Mapping
from typing import Any

from moepeft.models.weight_mapping import CheckpointError
from moepeft.nn.rope import KINDS, Rope

# {field of Rope: its name in config.json}.
_HF_NAMES = {
  'factor': 'factor',
  'original': 'original_max_position_embeddings',
  'low': 'low_freq_factor',
  'high': 'high_freq_factor',
  'fast': 'beta_fast',
  'slow': 'beta_slow',
  'attention': 'attention_factor',
  'truncate': 'truncate',
}
_FIELDS_BY_KIND = {
  'default': (),
  'linear': ('factor',),
  'llama3': ('factor', 'original', 'low', 'high'),
  'yarn': ('factor', 'original', 'fast', 'slow', 'attention', 'truncate'),
}


def rope_from_hf(fields: Mapping[str, Any]) -> Rope:
  """Reads `rope_parameters` (transformers 5) or `rope_theta` and
  `rope_scaling` (4).

  If a file has both, the value that `transformers` uses is read.

  Raises:
    CheckpointError: the scaling is not supported.
  """
  parameters = fields.get('rope_scaling') or fields.get('rope_parameters') or {}
  rope_type = parameters.get('rope_type') or parameters.get('type') or 'default'
  theta = parameters.get('rope_theta') or fields.get('rope_theta') or 10000.0
  partial = parameters.get('partial_rotary_factor')
  partial = partial or fields.get('partial_rotary_factor') or 1.0
  unsupported = None if rope_type in KINDS else repr(rope_type)
  if partial != 1.0:
    unsupported = 'a partial_rotary_factor'
  if any(isinstance(value, Mapping) for value in parameters.values()):
    unsupported = 'one for each type of layer'
  if unsupported:
    raise CheckpointError(
      f'the RoPE scaling in config.json is {unsupported}: supported are '
      f'{", ".join(KINDS)}, over whole heads and equal in all layers; use a '
      'model with another scaling'
    )
  settings = {
    name: parameters[_HF_NAMES[name]]
    for name in _FIELDS_BY_KIND[rope_type]
    if parameters.get(_HF_NAMES[name]) is not None
    # transformers treats 0 as missing here.
    and (parameters[_HF_NAMES[name]] or name not in ('fast', 'slow'))
  }
  if rope_type == 'linear' and 'factor' not in settings:
    raise CheckpointError(
      'the RoPE scaling in config.json is linear, but its factor is missing: '
      'use the config.json of the model'
    )
  if 'original' in _FIELDS_BY_KIND[rope_type]:
    length = fields.get('max_position_embeddings') or 2048
    default = settings.get('original', length)
    original = fields.get('original_max_position_embeddings') or default
    settings['original'] = original
    settings.setdefault('factor', length / original)
  if rope_type == 'yarn' and 'attention' not in settings:
    settings |= _mscale_attention(parameters, settings['factor'])
  return Rope(theta=float(theta), kind=rope_type, **settings)


def _mscale_attention(
  parameters: Mapping[str, Any], factor: float
) -> dict[str, float]:
  """YaRN's attention factor from the fields of DeepSeek's models."""
  scales = [parameters.get(key) for key in ('mscale', 'mscale_all_dim')]
  if not all(scales):
    return {}
  numerator, denominator = (
    0.1 * m * math.log(max(factor, 1)) + 1 for m in scales
  )
  return {'attention': numerator / denominator}


def rope_to_hf(rope: Rope) -> dict[str, Any]:
  """The content of `rope_parameters`."""
  fields = {'rope_type': rope.kind, 'rope_theta': rope.theta}
  for name in _FIELDS_BY_KIND[rope.kind]:
    value = getattr(rope, name)
    # Fields with default values are omitted.
    if (name, value) not in (('attention', 0.0), ('truncate', True)):
      fields[_HF_NAMES[name]] = value
  return fields
