# SPDX-License-Identifier: Apache-2.0
"""Reads and writes prompt tuning of `peft`, and reads its P-tuning.

adapter_model.safetensors has one array, prompt_embeddings [r, d], for r tokens.
In P-tuning an MLP or LSTM computed them in training, and the result is stored.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moepeft.checkpoints import directory
from moepeft.checkpoints.adapter import AdapterWeights, sites_in
from moepeft.config.method_string import Spec
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError, Shape

PEFT_TYPE = 'PROMPT_TUNING'
PEFT_TYPES = (PEFT_TYPE, 'P_TUNING')
_NAME = 'prompt_embeddings'
_SITE = 'embed'


def read(
  path: str, config: Any, fields: Mapping[str, Any], tensors: directory.Tensors
) -> AdapterWeights:
  """Reads an adapter's method and float32 tree.

  Args:
    path: the directory, for errors.
    config: the base model's config.
    fields: of adapter_config.json.
    tensors: of adapter_model.safetensors.

  Raises:
    CheckpointError: an encoder-decoder has a prompt in its decoder, too, the
      array has a wrong shape, or the model scales its embeddings.
  """
  _check_unscaled(config)
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
  """(fields of adapter_config.json, arrays) of a prompt.

  Raises:
    CheckpointError: the model scales its embeddings.
  """
  _check_unscaled(config)
  vectors = np.asarray(sites_in(adapter.tree, 'prompt')[_SITE]['vectors'])
  # peft requires these fields, but does not use them.
  layers = getattr(config, 'encoder_layers', None) or config.layers
  return {
    'peft_type': PEFT_TYPE,
    'num_virtual_tokens': vectors.shape[0],
    'token_dim': vectors.shape[1],
    'num_transformer_submodules': 1,
    'num_attention_heads': config.heads,
    'num_layers': layers,
    'prompt_tuning_init': 'RANDOM',
  }, {_NAME: vectors}


def _check_unscaled(config: Any) -> None:
  if getattr(config, 'scale_embedding', False):
    raise CheckpointError(
      'the model scales its embeddings. Whether peft scales the vectors of a '
      'prompt, too, depends on the version of transformers: write the moepeft '
      'format instead'
    )
