# SPDX-License-Identifier: Apache-2.0
"""What decoders' arrays are called elsewhere, each by its family's rules."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from moepeft.models import FAMILIES
from moepeft.models.decoder import hf_config
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.hf_config import depths as depths
from moepeft.models.decoder.hf_config import in_layers as in_layers
from moepeft.models.decoder.hf_config import projections as projections
from moepeft.models.decoder.hf_config import sizes as sizes
from moepeft.models.decoder.hf_config import taps as taps
from moepeft.models.decoder.model import MODULE
from moepeft.models.hf_layout import Layout
from moepeft.models.weight_mapping import CheckpointError, Rule, entries

Config = DecoderConfig
_FAMILIES = {
  name: family for name, family in FAMILIES.items() if family.MODULE is MODULE
}
# `model_type` in config.json -> the family's file.
HF_TYPES = {
  kind: family for family in _FAMILIES.values() for kind in family.HF_TYPES
}
# What Hugging Face's peft calls what the model does.
PEFT_TASK = 'CAUSAL_LM'


def layout(fields: Mapping[str, Any]) -> Layout:
  """Of files whose `config.json` has these fields."""
  return _room(HF_TYPES[fields['model_type']]).LAYOUT


def hf_rules(config: DecoderConfig) -> tuple[Rule, ...]:
  """Rules for the family's `...ForCausalLM`."""
  return _form(config).hf_rules(config)


def ends(config: DecoderConfig) -> dict[str, tuple[str, str]]:
  """The sites of the embedding and the head, as `projections`."""
  del config
  return {'embed': ('v', 'd'), 'head': ('d', 'v')}


def hf_module(site: str, config: DecoderConfig) -> str:
  """'decoder/self/q' -> 'model.layers.{l}.self_attn.q_proj'."""
  layout = _form(config).LAYOUT
  if site in ('embed', 'head'):
    name = layout.embedding if site == 'embed' else layout.head
    return name.removesuffix('.weight')
  return _form(config).hf_module(site)


def hf_modules(config: DecoderConfig) -> set[str]:
  """Every module with a weight, 'model.layers.0.self_attn.q_proj'."""
  found = entries(hf_rules(config), sizes(config), depths(config))
  return {
    entry.their_name.removesuffix('.weight')
    for entry in found
    if entry.their_name.endswith('.weight')
  }


def config_from_hf(fields: Mapping[str, Any], tied: bool) -> DecoderConfig:
  """Reads a `config.json` whose model_type is in HF_TYPES.

  Raises:
    CheckpointError: the family can not have what it says.
  """
  family = HF_TYPES[fields['model_type']]
  if tied and not fields.get('tie_word_embeddings', family.TIED):
    raise CheckpointError(
      'config.json says that the head is not the embedding '
      '(tie_word_embeddings is false, or absent and false in this family), '
      'and the files hold no head: expected a model that was saved as one for '
      'causal language modelling'
    )
  return family.from_hf(fields, bool(tied))


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json`.

  Raises:
    CheckpointError: it can not say all that the config says.
  """
  fields = _FAMILIES[config.family].to_hf(config)
  said, wanted = _meaning(config_from_hf(fields, config.tied)), _meaning(config)
  lost = [name for name in wanted if said[name] != wanted[name]]
  if lost:
    raise CheckpointError(
      f"Hugging Face's {fields['model_type']} has no words for this model's "
      f'{", ".join(lost)}: expected the options of its family; '
      'keep such a model as moepeft has it'
    )
  return fields


def _meaning(config: DecoderConfig) -> dict[str, Any]:
  """Its fields, each thing in one way only; less dropout, which no file has."""
  fields = dataclasses.asdict(config)
  fields['scale'] = config.scale or config.head_dim**-0.5
  windowed = config.windowed or (True,) * config.layers
  windowed = tuple(layer and config.window > 0 for layer in windowed)
  fields |= {'windowed': windowed, 'window': any(windowed) and config.window}
  del fields['dropout']
  return fields


def _form(config: DecoderConfig) -> ModuleType:
  """Where the family's names are: its own file, if it has rules, or Llama's."""
  return _room(_FAMILIES[config.family])


def _room(family: ModuleType) -> ModuleType:
  return family if hasattr(family, 'hf_rules') else hf_config
