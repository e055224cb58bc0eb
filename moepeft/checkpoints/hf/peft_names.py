# SPDX-License-Identifier: Apache-2.0
"""Module names in `peft`."""

import re
from typing import Any

from moepeft.checkpoints.hf import model as hf
from moepeft.models.weight_mapping import CheckpointError

PREFIX = 'base_model.model.'
_LEAF = re.compile(
  r'\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|ia3_l'
  r'|vera_lambda_[bd]|ln_tuning_layers\.(weight|bias))$'
)


def module_of(name: str) -> str:
  """The module of an array in peft: 'encoder.block.0. ... .q'."""
  return _LEAF.sub('', name.removeprefix(PREFIX))


def site_module(config: Any, site: str) -> str:
  """Returns the name of a site's module, with `{l}` for the layer number.

  Raises:
    CheckpointError: another site has the same module.
  """
  family = hf.family_of(config)
  module = family.hf.module_name(site, config)
  sharing_sites = [
    candidate
    for candidate in family.projections(config)
    if family.hf.module_name(candidate, config) == module
  ]
  if len(sharing_sites) > 1:
    raise CheckpointError(
      f'{", ".join(sharing_sites)} are one module in Hugging Face, '
      f'{module.rpartition("}.")[2]}, and one adapter in peft, which is not '
      'supported: merge it into its base (with merge_and_unload of peft, or '
      'moepeft.convert --to=hf) and use the merged model'
    )
  return module
