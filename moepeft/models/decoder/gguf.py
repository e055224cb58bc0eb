# SPDX-License-Identifier: Apache-2.0
"""Maps the arrays and metadata of decoders in GGUF files.

llama.cpp defines the format (ggml-org/ggml, docs/gguf.md).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moepeft.models.decoder.arrays import DecoderNames
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.family import GgufFormat, ModelFamily
from moepeft.models.weight_mapping import CheckpointError, Shape
from moepeft.nn.rope import Rope, frequencies

EMBEDDING, HEAD, ROPE = (
  'token_embd.weight',
  'output.weight',
  'rope_freqs.weight',
)
WINDOW = 'attention.sliding_window'
_NORMS = {'self/norm': 'attn_norm', 'mlp/norm': 'ffn_norm'}
NAMES = DecoderNames(
  layer='blk.{l}.',
  modules={
    'self/q': 'attn_q',
    'self/k': 'attn_k',
    'self/v': 'attn_v',
    'self/o': 'attn_output',
    'self/q_norm': 'attn_q_norm',
    'self/k_norm': 'attn_k_norm',
    'mlp/wi_0': 'ffn_gate',
    'mlp/wi_1': 'ffn_up',
    'mlp/wi': 'ffn_up',
    'mlp/wo': 'ffn_down',
  },
  norms=_NORMS,
  post_norms=_NORMS
  | {
    'self_post_norm': 'post_attention_norm',
    'mlp_post_norm': 'post_ffw_norm',
  },
  embedding='token_embd',
  positions='position_embd',
  norm='output_norm',
  head='output',
)
JOINED_QKV_NAMES = dataclasses.replace(
  NAMES,
  modules=NAMES.modules
  | dict.fromkeys(('self/q', 'self/k', 'self/v'), 'attn_qkv'),
)


def as_stored_by_hf(
  name: str, array: np.ndarray, gguf_format: GgufFormat, config: DecoderConfig
) -> np.ndarray:
  """Undoes the changes of llama.cpp's converter.

  In some families, the rows of queries and keys are in the order of llama.cpp's
  RoPE. Norms of Gemma are stored with their offset.
  """
  module = name.split('.')[-2]
  if gguf_format.interleaved_rope and module in ('attn_q', 'attn_k'):
    pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
  if config.norm_offset and module.endswith('_norm'):
    return array - np.asarray(config.norm_offset, array.dtype)
  return array


def config_from_metadata(
  families: Iterable[ModelFamily],
  metadata: Mapping[str, Any],
  shapes: Mapping[str, Shape],
  tied: bool,
  rope_factors: np.ndarray | None,
) -> DecoderConfig:
  """The config of a file.

  Args:
    families: all model families.
    metadata: the file's key-value metadata.
    shapes: {name: shape} of its tensors, in NumPy's order.
    rope_factors: the array ROPE, float [h / 2], or None.

  Raises:
    CheckpointError: the architecture or an option is not supported.
  """
  architecture = metadata.get('general.architecture')
  candidates = [family for family in families if family.gguf]
  architectures = [
    name for family in candidates for name in family.gguf.model_types
  ]
  if architecture not in architectures:
    raise CheckpointError(
      f'the GGUF file is of the architecture {architecture!r}; supported are '
      f'{", ".join(dict.fromkeys(architectures))}'
    )
  values = {
    key.removeprefix(f'{architecture}.'): _shortest_float(value)
    for key, value in metadata.items()
    if key.startswith(f'{architecture}.')
  }
  _check(values)
  family = next(
    family
    for family in candidates
    if architecture in family.gguf.model_types and family.gguf.accepts(values)
  )
  try:
    fields = family.gguf.fields(architecture, values, rope_factors)
  except KeyError as error:
    raise CheckpointError(
      f'the metadata of the GGUF file lack {architecture}.{error.args[0]}: it '
      'is damaged or has an old format; convert the model again'
    ) from None
  vocab = shapes.get(EMBEDDING, (0,))[0]
  fields |= {'vocab_size': vocab, 'tie_word_embeddings': tied}
  config = family.hf.from_fields(fields, tied)
  if not family.gguf.bias_from_tensors:
    return config
  has_bias = lambda name: f'blk.0.{name}.bias' in shapes  # noqa: E731
  return dataclasses.replace(
    config,
    attention_bias=has_bias('attn_q'),
    out_bias=has_bias('attn_output'),
    mlp_bias=has_bias('ffn_up'),
  )


# Metadata keys of sizes, at least 1, and of other numbers, at least 0.
_SIZES = """
  embedding_length attention.head_count attention.head_count_kv block_count
  attention.key_length rope.dimension_count feed_forward_length context_length
  rope.scaling.original_context_length
"""
_NUMBERS = """
  attention.layer_norm_rms_epsilon attention.layer_norm_epsilon rope.freq_base
  rope.scale_linear rope.scaling.factor rope.scaling.attn_factor
  rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
  rope.scaling.yarn_attn_factor attn_logit_softcapping
  final_logit_softcapping attention.sliding_window
"""


def _check(values: Mapping[str, Any]) -> None:
  """
  Raises:
    CheckpointError: a metadata value has a wrong type or range, or the model
      is not supported.
  """
  if values.get('expert_count'):
    raise CheckpointError(
      'the GGUF file has a mixture-of-experts model, which is not supported: '
      'use a dense model'
    )
  for number_type, minimum, names in (
    (int, 1, _SIZES),
    ((int, float), 0, _NUMBERS),
  ):
    for name in names.split():
      value = values.get(name)
      # Lists of one value per layer are refused below.
      if value is None or isinstance(value, list):
        continue
      is_number = isinstance(value, number_type) and not isinstance(value, bool)
      if not is_number or not minimum <= value < 2**31:
        raise CheckpointError(
          f'the GGUF file has {name} = {value!r:.60} in its metadata, expected '
          f'a number of at least {minimum}: convert the model again'
        )
  scaling = values.get('rope.scaling.type', '')
  if not isinstance(scaling, str):
    raise CheckpointError(
      f'the GGUF file has rope.scaling.type = {scaling!r:.60} in its metadata, '
      'expected a text: it is damaged, convert the model again'
    )
  per_layer = [key for key, value in values.items() if isinstance(value, list)]
  if per_layer:
    raise CheckpointError(
      f'layers of the GGUF file differ in {", ".join(per_layer)}: expected '
      'layers of one shape; others are not supported'
    )


def _shortest_float(value: Any) -> Any:
  """1e-05 instead of the float32's 9.999999747378752e-06."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def llama_fields(
  architecture: str, metadata: Mapping[str, Any], rope_factors: Any
) -> dict[str, Any]:
  """The fields of config.json of Llama; see `family.GgufFormat.fields`.

  Raises:
    KeyError: the metadata lack a size.
    CheckpointError: RoPE rotates only a part of a head.
  """
  d_model = metadata['embedding_length']
  heads = metadata['attention.head_count']
  head_dim = metadata.get('attention.key_length') or d_model // heads
  if metadata.get('rope.dimension_count', head_dim) != head_dim:
    raise CheckpointError(
      f'the GGUF file rotates {metadata["rope.dimension_count"]} of the '
      f'{head_dim} features of a head: expected RoPE over whole heads'
    )
  return {
    'model_type': architecture,
    'hidden_size': d_model,
    'num_attention_heads': heads,
    'num_key_value_heads': metadata.get('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'intermediate_size': metadata['feed_forward_length'],
    'num_hidden_layers': metadata['block_count'],
    'max_position_embeddings': metadata['context_length'],
    'rms_norm_eps': metadata['attention.layer_norm_rms_epsilon'],
    'rope_parameters': _rope(metadata, head_dim, rope_factors),
  }


_SCALING = {
  'factor': 'factor',
  'original_max_position_embeddings': 'original_context_length',
  'beta_fast': 'yarn_beta_fast',
  'beta_slow': 'yarn_beta_slow',
  'attention_factor': 'yarn_attn_factor',
}


def _rope(
  metadata: Mapping[str, Any], head_dim: int, rope_factors: Any
) -> dict[str, Any]:
  """Hugging Face's `rope_parameters`."""
  theta = metadata.get('rope.freq_base', 10000.0)
  # Old files have this key, for linear scaling.
  if 'rope.scale_linear' in metadata:
    linear = {'rope.scaling.factor': metadata['rope.scale_linear']}
    metadata = linear | dict(metadata)
  # llama.cpp reads a factor without a type as linear, and 0 as none.
  factor = metadata.get('rope.scaling.factor') or 1
  default_type = 'none' if factor == 1 else 'linear'
  rope_type = metadata.get('rope.scaling.type', default_type)
  scaling = {
    hf_name: metadata[f'rope.scaling.{name}']
    for hf_name, name in _SCALING.items()
    if f'rope.scaling.{name}' in metadata
  }
  if rope_factors is not None and not np.allclose(rope_factors, 1):
    return _llama3(theta, head_dim, np.asarray(rope_factors, np.float64))
  if rope_type == 'none':
    rope_type, scaling = 'default', {}
  return {'rope_type': rope_type, 'rope_theta': theta, **scaling}


def _llama3(
  theta: float, head_dim: int, rope_factors: np.ndarray
) -> dict[str, Any]:
  """Infers Llama 3.1's `rope_parameters` from the factors of RoPE.

  Between long and short wavelengths, the weight of the unscaled frequency is
  linear in the frequency. This determines high / low and original / low only;
  low is 1, as in all releases.
  """
  unscaled, _ = frequencies(Rope(theta=theta), head_dim)
  factor, high, original = rope_factors.max(), 4.0, 8192.0
  is_interpolated = (rope_factors > 1.001) & (rope_factors < factor * 0.999)
  if is_interpolated.sum() > 1:
    weight = (1 / rope_factors - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(
      unscaled[is_interpolated], weight[is_interpolated], 1
    )
    high, original = 1 - 1 / start, -slope / start * 2 * np.pi
  rope = Rope(theta, 'llama3', factor, round(original), 1.0, high)
  scaled, _ = frequencies(rope, head_dim)
  if not np.allclose(unscaled / rope_factors, scaled, rtol=1e-3):
    raise CheckpointError(
      f'the factors of RoPE in the GGUF file ({ROPE}) are not those of Llama '
      '3.1: expected its scaling; read the Hugging Face directory instead'
    )
  return {
    'rope_type': 'llama3',
    'rope_theta': theta,
    'factor': float(factor),
    'original_max_position_embeddings': round(original),
    'low_freq_factor': 1.0,
    'high_freq_factor': round(float(high), 4),
  }
