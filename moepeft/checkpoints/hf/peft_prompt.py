# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning in Hugging Face's `peft`: its vectors, as tokens of a text.

adapter_model.safetensors has one array, prompt_embeddings [r, d], r tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moepeft.checkpoints import directory
from moepeft.checkpoints.adapter import AdapterWeights, sites_in
from moepeft.config.method_string import Spec
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError, Shape

KIND = 'PROMPT_TUNING'
_NAME = 'prompt_embeddings'
_SITE = 'embed'


def read(
  path: str, config: Any, fields: Mapping[str, Any], tensors: directory.Tensors
) -> AdapterWeights:
  """The method and the tree, of float32.

  Args:
    path: of the directory, for errors.
    config: of the base model.
    fields: of adapter_config.json.
    tensors: of adapter_model.safetensors.

  Raises:
    CheckpointError: the decoder of an encoder-decoder has a prompt too, the
      array is another model's, or the model scales its vectors.
  """
  _require_plain(config)
  modules = fields.get('num_transformer_submodules') or 1
  if modules != 1:
    raise CheckpointError(
      f'{path} has a prompt of the encoder and one of the decoder '
      f'(num_transformer_submodules={modules}); one of the inputs alone is '
      'supported: train it with num_transformer_submodules=1'
    )
  length = fields.get('num_virtual_tokens')
  expected_shapes: dict[str, Shape] = {_NAME: (length, config.d_model)}
  if tensors.shapes != expected_shapes:
    raise CheckpointError(
      f'{path} holds {tensors.shapes}, expected {expected_shapes}: give the '
      'base model that the adapter was trained on'
    )
  vectors = tensors.fetch(_NAME)
  weight_mapping.check_finite(_NAME, vectors, path)
  vectors = np.asarray(vectors, np.float32)
  method = str(Spec('prompt', (('length', length),)))
  return AdapterWeights(method, {_SITE: {'prompt': {'vectors': vectors}}})


def write(
  config: Any, adapter: AdapterWeights
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(fields of adapter_config.json, arrays) of a prompt alone.

  Raises:
    CheckpointError: the model scales its vectors.
  """
  _require_plain(config)
  vectors = np.asarray(sites_in(adapter.tree, 'prompt')[_SITE]['vectors'])
  # What peft asks for, and does not look at.
  layers = getattr(config, 'encoder_layers', None) or config.layers
  return {
    'peft_type': KIND,
    'num_virtual_tokens': vectors.shape[0],
    'token_dim': vectors.shape[1],
    'num_transformer_submodules': 1,
    'num_attention_heads': config.heads,
    'num_layers': layers,
    'prompt_tuning_init': 'RANDOM',
  }, {_NAME: vectors}


def _require_plain(config: Any) -> None:
  if getattr(config, 'scale_embedding', False):
    raise CheckpointError(
      'the model multiplies the vectors of tokens, and those of a prompt in '
      'peft with some versions of transformers and not with others, which '
      "peft's files do not tell: keep such a prompt in the moepeft form"
    )
