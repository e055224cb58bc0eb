# SPDX-License-Identifier: Apache-2.0
"""Registry of base model families.

A new family is a file and a line in FAMILIES; docs/extending/model_family.md
has a worked example. `moepeft.models.family` defines an entry.
"""

from typing import Any

from moepeft.core.registry import Registry
from moepeft.models.family import ModelFamily as ModelFamily

FAMILIES: Registry = Registry(
  'model family',
  'moepeft.models',
  {
    't5': 't5.family:FAMILY',
    'llama': 'decoder.llama:FAMILY',
    'mistral': 'decoder.mistral:FAMILY',
    'qwen2': 'decoder.qwen2:FAMILY',
    'qwen3': 'decoder.qwen3:FAMILY',
    'gemma': 'decoder.gemma:FAMILY',
    'gpt2': 'decoder.gpt2:FAMILY',
    'bert': 'bert.family:FAMILY',
  },
)


def by_model_type() -> dict[str, ModelFamily]:
  """{`model_type` in a Hugging Face config.json: family}."""
  return {
    model_type: family
    for family in FAMILIES.values()
    for model_type in family.hf.model_types
  }


def decoder_only(model: Any) -> bool:
  """Whether a model, or a config of one, has no encoder."""
  return _architecture(model) == 'decoder'


def encoder_only(model: Any) -> bool:
  """Whether a model, or a config of one, has no decoder."""
  return _architecture(model) == 'encoder'


def _architecture(model: Any) -> str:
  config = getattr(model, 'config', model)
  return FAMILIES[config.family].architecture


def check_decodes(model: Any) -> None:
  """Checks that a model, or a config of one, has a decoder.

  Raises:
    ValueError: it has none.
  """
  if encoder_only(model):
    raise ValueError(
      'the model is an encoder without a decoder, which cannot be trained or '
      'generate text: set config.model to a family with a decoder, or compute '
      'embeddings with moepeft.serve.embeddings.encoder'
    )
