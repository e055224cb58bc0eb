# SPDX-License-Identifier: Apache-2.0
"""Modules as Hugging Face's `peft` names them."""

import re
from typing import Any

from moepeft.checkpoints.hf import model as hf
from moepeft.models.weight_mapping import CheckpointError

PREFIX = 'base_model.model.'
_LEAF = re.compile(
  r'\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|ia3_l)$'
)


def module_of(name: str) -> str:
  """The module of one of peft's arrays: 'encoder.block.0. ... .q'."""
  return _LEAF.sub('', name.removeprefix(PREFIX))


def own_module(config: Any, site: str) -> str:
  """The module of a site, which it must not share with others.

  Raises:
    CheckpointError: it does.
  """
  family = hf.family_of(config)
  module = family.hf.module_name(site, config)
  alike = [
    candidate
    for candidate in family.projections(config)
    if family.hf.module_name(candidate, config) == module
  ]
  if len(alike) > 1:
    raise CheckpointError(
      f'{", ".join(alike)} are one module in Hugging Face, '
      f'{module.rpartition("}.")[2]}, and one adapter in peft, which is not '
      'supported: merge it into its base (with peft merge_and_unload, with '
      'moepeft.convert --to=hf) and go on from the merged model'
    )
  return module
