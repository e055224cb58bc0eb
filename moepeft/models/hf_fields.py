# SPDX-License-Identifier: Apache-2.0
"""Checks the types and ranges of the fields of Hugging Face's `config.json`.

The families compute with these fields, so that wrong types and zero sizes are
refused first.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moepeft.core import untrusted


@dataclasses.dataclass(frozen=True)
class FieldType:
  """The type and range of a field.

  Attributes:
    minimum: the minimum value, None for any.
    exclusive: whether the minimum itself is refused.
  """

  type: type
  minimum: float | None = None
  exclusive: bool = False


SIZE, INTEGER = FieldType(int, 1), FieldType(int, 0)
POSITIVE, NUMBER = FieldType(float, 0, exclusive=True), FieldType(float, 0)
TEXT, SWITCH = FieldType(str), FieldType(bool)

# Fields that several families read. Those of one family are in
# `HuggingFaceFormat.field_types`.
_TYPES = {
  SIZE: """
    vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim max_position_embeddings
    original_max_position_embeddings
  """,
  INTEGER: 'sliding_window max_window_layers',
  POSITIVE: """
    rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor
  """,
  NUMBER: """
    rms_norm_eps layer_norm_epsilon beta_fast beta_slow attention_factor mscale
    mscale_all_dim
  """,
  TEXT: """
    model_type transformers_version hidden_act hidden_activation rope_type type
  """,
  SWITCH: """
    tie_word_embeddings attention_bias mlp_bias use_sliding_window
    add_cross_attention truncate
  """,
}
_ROPE = ('rope_scaling', 'rope_parameters')
FIELD_TYPES: Mapping[str, FieldType] = {
  **{
    name: field_type
    for field_type, names in _TYPES.items()
    for name in names.split()
  },
  **dict.fromkeys(_ROPE, FieldType(dict)),
  'layer_types': FieldType(list),
}


def with_aliases(
  fields: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
  """Renames aliases of fields to the names that the family reads.

  Args:
    aliases: {name that transformers' class also accepts: the field's name}.
  """
  renamed = {
    name: fields[alias]
    for alias, name in aliases.items()
    if fields.get(alias) is not None
  }
  return renamed | dict(fields)


def check(
  fields: Mapping[str, Any], family_types: Mapping[str, FieldType]
) -> None:
  """Checks the fields that have a type; other fields are ignored.

  Args:
    family_types: types of the fields that only the model's family reads.

  Raises:
    ValueError: a field has a wrong type or is out of range; the message names
      it.
  """
  for name, field_type in {**FIELD_TYPES, **family_types}.items():
    value = untrusted.field(fields, name, field_type.type, None)
    if value is None:
      continue
    if field_type.type is float and not math.isfinite(value):
      raise ValueError(f'expected a finite number in {name!r}, got {value}')
    minimum = field_type.minimum
    if minimum is None:
      continue
    if field_type.exclusive and value <= minimum:
      raise ValueError(
        f'expected a number above {minimum} in {name!r}, got {value}'
      )
    if value < minimum:
      raise ValueError(f'expected at least {minimum} in {name!r}, got {value}')
  for name in _ROPE:
    if fields.get(name):
      check(fields[name], family_types)
  if not all(isinstance(kind, str) for kind in fields.get('layer_types') or ()):
    raise ValueError("expected a list of texts in 'layer_types'")
