# SPDX-License-Identifier: Apache-2.0
"""Reads and writes prefix tuning of `peft`, for decoders with RoPE.

adapter_model.safetensors has one array, prompt_embeddings [r, l 2 k h]: r keys
and values of each layer, also where an MLP computed them in training.

peft puts them into the cache of transformers, where the first token then has
the position r. In moepeft it has the position 0, and the keys of the prefix are
rotated by -r instead, which gives the same logits. Other positions have no such
equivalent: learned ones are added to the tokens, and T5's relative bias and
ALiBi to the logits of the prefix.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moepeft.checkpoints import directory
from moepeft.checkpoints.adapter import AdapterWeights, sites_in
from moepeft.config.method_string import Spec
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError, Shape
from moepeft.nn.rope import Rope, frequencies

PEFT_TYPE = 'PREFIX_TUNING'
_NAME = 'prompt_embeddings'
_SITE = 'decoder/self/core'


def read(
  path: str, config: Any, fields: Mapping[str, Any], tensors: directory.Tensors
) -> AdapterWeights:
  """Reads an adapter's method and float32 tree.

  Args: as of `peft_prompt.read`.

  Raises:
    CheckpointError: the array has a wrong shape, or the model's positions have
      no equivalent.
  """
  _check_positions(config)
  length = fields.get('num_virtual_tokens')
  size = config.layers * 2 * config.kv_heads * config.head_dim
  expected_shapes: dict[str, Shape] = {_NAME: (length, size)}
  if tensors.shapes != expected_shapes:
    raise CheckpointError(
      f'{path} holds {tensors.shapes}, expected {expected_shapes}: give the '
      'base model that the adapter was trained on'
    )
  vectors = tensors.fetch(_NAME)
  weight_mapping.check_finite(_NAME, vectors, path)
  shape = (length, config.layers, 2, config.kv_heads, config.head_dim)
  vectors = np.asarray(vectors, np.float32).reshape(shape)
  if not vectors.any(axis=(2, 3, 4)).all():
    raise CheckpointError(
      f"{path} holds vectors of zeros (peft's init_weights='zero'), which are "
      'padding in moepeft: train the adapter first'
    )
  # [l, r, k, h] each.
  k, v = np.moveaxis(vectors, (2, 1), (0, 1)).copy()
  arrays = {'k': _rotate(k, -length, config.rope), 'v': v}
  method = str(Spec('prefix', (('length', length),)))
  core = {'core': {'prefix': arrays}}
  return AdapterWeights(method, {'decoder': {'layers': {'self': core}}})


def write(
  config: Any, adapter: AdapterWeights
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(fields of adapter_config.json, arrays) of a prefix.

  Raises:
    CheckpointError: the model's positions have no equivalent.
  """
  _check_positions(config)
  arrays = sites_in(adapter.tree, 'prefix')[_SITE]
  k, v = (np.asarray(arrays[name], np.float32) for name in 'kv')
  layers, length, heads, head_dim = k.shape
  vectors = np.stack([_rotate(k, length, config.rope), v], axis=1)
  vectors = np.moveaxis(vectors, 2, 0).reshape(length, -1)
  return {
    'peft_type': PEFT_TYPE,
    'num_virtual_tokens': length,
    'token_dim': heads * head_dim,
    'encoder_hidden_size': heads * head_dim,
    'prefix_projection': False,
    'num_transformer_submodules': 1,
    'num_attention_heads': heads,
    'num_layers': layers,
  }, {_NAME: np.ascontiguousarray(vectors)}


def _rotate(k: np.ndarray, position: int, rope: Rope) -> np.ndarray:
  """Rotates keys [..., h] as `nn.rope.rotate`, without its factor."""
  radians, _ = frequencies(rope, k.shape[-1])
  angles = position * radians.astype(np.float64)
  first, second = np.split(k.astype(np.float64), 2, axis=-1)
  cos, sin = np.cos(angles), np.sin(angles)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return np.concatenate(rotated, axis=-1).astype(np.float32)


def _check_positions(config: Any) -> None:
  if getattr(config, 'positions', '') != 'rope':
    raise CheckpointError(
      'peft moves the positions of the tokens by the length of a prefix, which '
      'has an equivalent in decoders with rotary positions (RoPE) only: write '
      'the moepeft format instead, or train the prefix with moepeft'
    )
  if config.window:
    raise CheckpointError(
      "in transformers the model's window of attention hides a prefix from "
      'later tokens, and in moepeft all tokens see it: write the moepeft '
      'format instead, or train the prefix with moepeft'
    )
