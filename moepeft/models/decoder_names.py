# SPDX-License-Identifier: Apache-2.0
"""What decoders' arrays are called elsewhere, each by its family's rules."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from moepeft.models import gemma, llama, llama_form, mistral, qwen2, qwen3
from moepeft.models.decoder import DecoderConfig
from moepeft.models.llama_form import HF_EMBEDDING as HF_EMBEDDING
from moepeft.models.llama_form import HF_HEAD as HF_HEAD
from moepeft.models.llama_form import depths as depths
from moepeft.models.llama_form import in_layers as in_layers
from moepeft.models.llama_form import projections as projections
from moepeft.models.llama_form import sizes as sizes
from moepeft.models.llama_form import taps as taps
from moepeft.models.names import Rule, entries

Config = DecoderConfig
# A new family is one new file and one entry.
_FAMILIES = {
  'llama': llama,
  'mistral': mistral,
  'qwen2': qwen2,
  'qwen3': qwen3,
  'gemma': gemma,
}
# `model_type` in config.json -> the family's file.
HF_TYPES = {
  kind: family for family in _FAMILIES.values() for kind in family.HF_TYPES
}
# What Hugging Face's peft calls what the model does.
PEFT_TASK = 'CAUSAL_LM'
# Constants that older files hold beside the weights.
HF_IGNORED = frozenset()


def hf_rules(config: DecoderConfig) -> tuple[Rule, ...]:
  """Rules for the family's `...ForCausalLM`."""
  return _form(config).hf_rules(config)


def hf_module(site: str, config: DecoderConfig) -> str:
  """'decoder/self/q' -> 'model.layers.{l}.self_attn.q_proj'."""
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
  """Reads a `config.json` whose model_type is in HF_TYPES."""
  return HF_TYPES[fields['model_type']].from_hf(fields, tied)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json`."""
  return _FAMILIES[config.family].to_hf(config)


def _form(config: DecoderConfig) -> ModuleType:
  """Where the family's names are: its own file, if it has rules, or Llama's."""
  family = _FAMILIES[config.family]
  return family if hasattr(family, 'hf_rules') else llama_form
