# SPDX-License-Identifier: Apache-2.0
"""Mistral (arXiv:2310.06825): a Llama whose layers may see a window only."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.config import from_fields as from_fields
from moepeft.models.decoder.hf_config import (
  released,
  shape_from_hf,
  shape_to_hf,
)
from moepeft.models.decoder.model import MODULE as MODULE
from moepeft.models.decoder.model import sites as sites
from moepeft.nn.rope import Rope

HF_TYPES = ('mistral',)
# Whether the head is the embedding where config.json is silent.
TIED = False
_7B = DecoderConfig(
  family='mistral',
  d_model=4096,
  heads=32,
  kv_heads=8,
  head_dim=128,
  ffn=14336,
  layers=32,
  eps=1e-5,
  length=32768,
)

# From the models' own config.json.
SIZES = {
  '7b-v0.1': dataclasses.replace(_7B, window=4096),
  '7b-v0.2': dataclasses.replace(_7B, rope=Rope(theta=1e6)),
  '7b-v0.3': dataclasses.replace(_7B, vocab=32768, rope=Rope(theta=1e6)),
}

config = functools.partial(released, 'Mistral', SIZES)


def from_hf(fields: Mapping[str, Any], tied: bool) -> DecoderConfig:
  """Reads a `config.json`; see `llama_form.shape_from_hf`."""
  # What transformers takes where the file is silent.
  fields = {
    'max_position_embeddings': 131072,
    'sliding_window': 4096,
    **fields,
  }
  return dataclasses.replace(
    shape_from_hf(fields, 'mistral', tied, kv_heads=8),
    window=fields.get('sliding_window') or 0,
  )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json`."""
  return shape_to_hf(config) | {
    'architectures': ['MistralForCausalLM'],
    'model_type': 'mistral',
    'sliding_window': config.window or None,
  }
