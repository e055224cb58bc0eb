# SPDX-License-Identifier: Apache-2.0
"""What Hugging Face's `config.json` says of rotary positions."""

import math
from collections.abc import Mapping
from typing import Any

from moepeft.models.weight_mapping import CheckpointError
from moepeft.nn.rope import KINDS, Rope

# Hugging Face's names of what scales a Rope.
_ROPE = {
  'factor': 'factor',
  'original': 'original_max_position_embeddings',
  'low': 'low_freq_factor',
  'high': 'high_freq_factor',
  'fast': 'beta_fast',
  'slow': 'beta_slow',
  'attention': 'attention_factor',
  'truncate': 'truncate',
}
_ROPE_OF = {
  'default': (),
  'linear': ('factor',),
  'llama3': ('factor', 'original', 'low', 'high'),
  'yarn': ('factor', 'original', 'fast', 'slow', 'attention', 'truncate'),
}


def rope_from_hf(fields: Mapping[str, Any]) -> Rope:
  """Reads `rope_parameters` (transformers 5) or `rope_theta` and
  `rope_scaling` (4).

  Where a file says things twice, the one that `transformers` goes by counts.

  Raises:
    CheckpointError: a scaling that is not supported.
  """
  said = fields.get('rope_scaling') or fields.get('rope_parameters') or {}
  kind = said.get('rope_type') or said.get('type') or 'default'
  theta = said.get('rope_theta') or fields.get('rope_theta') or 10000.0
  partial = said.get('partial_rotary_factor')
  partial = partial or fields.get('partial_rotary_factor') or 1.0
  what = None if kind in KINDS else repr(kind)
  if partial != 1.0:
    what = 'a partial_rotary_factor'
  if any(isinstance(value, Mapping) for value in said.values()):
    what = 'one for each type of layer'
  if what:
    raise CheckpointError(
      f'the RoPE scaling in config.json is {what}: supported are '
      f'{", ".join(KINDS)}, over whole heads and alike in all layers; take a '
      'model of another scaling'
    )
  found = {
    ours: said[_ROPE[ours]]
    for ours in _ROPE_OF[kind]
    if said.get(_ROPE[ours]) is not None
    # Nought of these means to transformers that nothing is said.
    and (said[_ROPE[ours]] or ours not in ('fast', 'slow'))
  }
  if kind == 'linear' and 'factor' not in found:
    raise CheckpointError(
      'the RoPE scaling in config.json is linear and lacks factor: expected by '
      'how much contexts get longer; take the config.json of the model'
    )
  if 'original' in _ROPE_OF[kind]:
    length = fields.get('max_position_embeddings') or 2048
    usual = found.get('original', length)
    original = fields.get('original_max_position_embeddings') or usual
    found['original'] = original
    found.setdefault('factor', length / original)
  if kind == 'yarn' and 'attention' not in found:
    found |= _of_mscale(said, found['factor'])
  return Rope(theta=float(theta), kind=kind, **found)


def _of_mscale(said: Mapping[str, Any], factor: float) -> dict[str, float]:
  """YaRN's factor of queries and keys as DeepSeek's models say it."""
  both = [said.get(key) for key in ('mscale', 'mscale_all_dim')]
  if not all(both):
    return {}
  over, under = (0.1 * m * math.log(max(factor, 1)) + 1 for m in both)
  return {'attention': over / under}


def rope_to_hf(rope: Rope) -> dict[str, Any]:
  """The content of `rope_parameters`."""
  fields = {'rope_type': rope.kind, 'rope_theta': rope.theta}
  for name in _ROPE_OF[rope.kind]:
    value = getattr(rope, name)
    # What is absent there is the usual here.
    if (name, value) not in (('attention', 0.0), ('truncate', True)):
      fields[_ROPE[name]] = value
  return fields
