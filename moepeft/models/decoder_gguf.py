# SPDX-License-Identifier: Apache-2.0
"""What decoders' arrays are called in GGUF files, and what the files' metadata
says. The form is that of llama.cpp (ggml-org/ggml, docs/gguf.md)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moepeft.models import decoder_weights
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.hf_config import biased, in_layers, projections
from moepeft.models.weight_mapping import CheckpointError, Rule, Shape
from moepeft.nn.rope import Rope, frequencies

# `general.architecture` -> `model_type` in Hugging Face's config.json.
ARCHITECTURES = {
  'llama': 'llama',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'gemma': 'gemma',
  'gemma2': 'gemma2',
  'gpt2': 'gpt2',
}
EMBEDDING, HEAD, ROPE = (
  'token_embd.weight',
  'output.weight',
  'rope_freqs.weight',
)
_SITES = {
  'self/q': 'attn_q',
  'self/k': 'attn_k',
  'self/v': 'attn_v',
  'self/o': 'attn_output',
  'self/norm': 'attn_norm',
  'self/q_norm': 'attn_q_norm',
  'self/k_norm': 'attn_k_norm',
  'self_post_norm': 'post_attention_norm',
  'mlp/wi_0': 'ffn_gate',
  'mlp/wi_1': 'ffn_up',
  'mlp/wi': 'ffn_up',
  'mlp/wo': 'ffn_down',
  'mlp/norm': 'ffn_norm',
  'mlp_post_norm': 'post_ffw_norm',
}


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
  """Rules for the tensors of a file; kernels are [out, in]."""
  found = [Rule('embed/embedding', EMBEDDING, 'vd', 'vd')]
  if config.positions == 'learned':
    found.append(
      Rule('positions/embedding', 'position_embd.weight', 'pd', 'pd')
    )
  for site, (inner, outer) in projections(config).items():
    found += _projection(config, site, inner, outer)
  norms = ['self/norm', 'mlp/norm']
  if config.post_norms:
    norms += ['self_post_norm', 'mlp_post_norm']
  for name in norms:
    found += _norm(config, in_layers(f'decoder/{name}'), _theirs(name))
  for name in ('self/q_norm', 'self/k_norm') if config.qk_norm else ():
    ours = f'{in_layers(f"decoder/{name}")}/scale'
    found.append(Rule(ours, f'{_theirs(name)}.weight', 'h', 'h'))
  found += _norm(config, 'decoder/norm', 'output_norm')
  if not config.tied:
    found.append(Rule('head/kernel', HEAD, 'dv', 'vd'))
  return tuple(found)


def _theirs(name: str) -> str:
  return f'blk.{{l}}.{_SITES[name]}'


def _projection(config, site: str, inner: str, outer: str) -> list[Rule]:
  ours, name = in_layers(site), site.removeprefix('decoder/')
  theirs, part, joined = _theirs(name), (0, 1), f'({outer})'
  if config.family == 'gpt2' and outer != 'd' and name.startswith('self/'):
    theirs, joined = 'blk.{l}.attn_qkv', f'(*{outer})'
    part = ('qkv'.index(site[-1]), 3)
  rows = f'{joined}({inner})'
  found = [
    Rule(f'{ours}/kernel', f'{theirs}.weight', inner + outer, rows, part)
  ]
  if site in biased(config):
    found.append(Rule(f'{ours}/bias', f'{theirs}.bias', outer, joined, part))
  return found


def _norm(config, ours: str, theirs: str) -> list[Rule]:
  found = [Rule(f'{ours}/scale', f'{theirs}.weight', 'd', 'd')]
  if config.centred:
    found.append(Rule(f'{ours}/bias', f'{theirs}.bias', 'd', 'd'))
  return found


def as_stored_by_hf(
  name: str, array: np.ndarray, arch: str, config: DecoderConfig
) -> np.ndarray:
  """Undoes what llama.cpp's converter does to some tensors.

  Rows of llama's queries and keys stand in the order of its own RoPE, which
  turns neighbours (x_2i with x_2i+1); norms of Gemma hold the whole scale.
  """
  kind = name.split('.')[-2]
  if arch == 'llama' and kind in ('attn_q', 'attn_k'):
    pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
  if config.norm_offset and kind.endswith('_norm'):
    return array - np.asarray(config.norm_offset, array.dtype)
  return array


def config_from_metadata(
  metadata: Mapping[str, Any],
  shapes: Mapping[str, Shape],
  tied: bool,
  factors: np.ndarray | None,
) -> DecoderConfig:
  """The config of a file.

  Args:
    metadata: its key-value pairs.
    shapes: of its tensors, NumPy's order.
    factors: what ROPE holds, float [h / 2], or None.

  Raises:
    CheckpointError: an architecture or option that is not supported.
  """
  arch = metadata.get('general.architecture')
  if not isinstance(arch, str) or arch not in ARCHITECTURES:
    raise CheckpointError(
      f'the GGUF file is of the architecture {arch!r}; supported are '
      f'{", ".join(ARCHITECTURES)}'
    )
  said = {
    key.removeprefix(f'{arch}.'): _plain(value)
    for key, value in metadata.items()
    if key.startswith(f'{arch}.')
  }
  if said.get('expert_count'):
    raise CheckpointError(
      'the GGUF file is of a mixture-of-experts model: expected a dense one; '
      'they are not supported'
    )
  _check(said)
  differ = [key for key, value in said.items() if isinstance(value, list)]
  if differ:
    raise CheckpointError(
      f'layers of the GGUF file differ in {", ".join(differ)}: expected layers '
      'of one shape; others are not supported'
    )
  try:
    fields = _gpt2(said) if arch == 'gpt2' else _llama(arch, said, factors)
  except KeyError as error:
    raise CheckpointError(
      f'the metadata of the GGUF file lack {arch}.{error.args[0]}: it is '
      'damaged or of an old form; convert the model again'
    ) from None
  vocab = shapes.get(EMBEDDING, (0,))[0]
  fields |= {'vocab_size': vocab, 'tie_word_embeddings': tied}
  config = decoder_weights.config_from_hf(fields, tied)
  if arch in ('gpt2', 'qwen2'):
    return config
  has = lambda name: f'blk.0.{name}.bias' in shapes  # noqa: E731
  return dataclasses.replace(
    config,
    attention_bias=has('attn_q'),
    out_bias=has('attn_output'),
    mlp_bias=has('ffn_up'),
  )


# Sizes, at least 1; other numbers above 0 if they are not said to be none; and
# texts.
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


def _check(said: Mapping[str, Any]) -> None:
  """
  Raises:
    CheckpointError: a value of the metadata is of another type or range.
  """
  for kind, least, names in (
    (int, 1, _SIZES),
    ((int, float), 0, _NUMBERS),
  ):
    for name in names.split():
      value = said.get(name)
      # Lists, one value a layer, are refused by themselves.
      if value is None or isinstance(value, list):
        continue
      number = isinstance(value, kind) and not isinstance(value, bool)
      if not number or not least <= value < 2**31:
        raise CheckpointError(
          f'the GGUF file has {name} = {value!r:.60} in its metadata, expected '
          f'a number of at least {least}: convert the model again'
        )
  scaling = said.get('rope.scaling.type', '')
  if not isinstance(scaling, str):
    raise CheckpointError(
      f'the GGUF file has rope.scaling.type = {scaling!r:.60} in its metadata, '
      'expected a text: it is damaged, convert the model again'
    )


def _plain(value: Any) -> Any:
  """1e-05 instead of the float32's 9.999999747378752e-06."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _gpt2(said: Mapping[str, Any]) -> dict[str, Any]:
  return {
    'model_type': 'gpt2',
    'n_embd': said['embedding_length'],
    'n_head': said['attention.head_count'],
    'n_layer': said['block_count'],
    'n_positions': said['context_length'],
    'n_inner': said['feed_forward_length'],
    'layer_norm_epsilon': said['attention.layer_norm_epsilon'],
  }


def _llama(arch: str, said: Mapping[str, Any], factors) -> dict[str, Any]:
  d_model, heads = said['embedding_length'], said['attention.head_count']
  window = said.get('attention.sliding_window')
  # Mistral's files are of the architecture llama.
  kind = 'mistral' if arch == 'llama' and window else ARCHITECTURES[arch]
  head_dim = said.get('attention.key_length') or d_model // heads
  if said.get('rope.dimension_count', head_dim) != head_dim:
    raise CheckpointError(
      f'the GGUF file turns {said["rope.dimension_count"]} of the '
      f'{head_dim} features of a head: expected RoPE over whole heads'
    )
  fields = {
    'model_type': kind,
    'hidden_size': d_model,
    'num_attention_heads': heads,
    'num_key_value_heads': said.get('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'intermediate_size': said['feed_forward_length'],
    'num_hidden_layers': said['block_count'],
    'max_position_embeddings': said['context_length'],
    'rms_norm_eps': said['attention.layer_norm_rms_epsilon'],
    'rope_parameters': _rope(said, head_dim, factors),
  }
  if kind == 'mistral':
    fields['sliding_window'] = window
  if kind == 'gemma2':
    fields |= _gemma2(said, fields)
  return fields


def _gemma2(said: Mapping[str, Any], fields) -> dict[str, Any]:
  # The scale is not in the file: llama.cpp knows the largest by its depth.
  of_27b = fields['hidden_size'] // fields['num_attention_heads']
  largest = fields['num_hidden_layers'] == 46
  return {
    'query_pre_attn_scalar': of_27b if largest else fields['head_dim'],
    'sliding_window': said.get('attention.sliding_window', 4096),
    'attn_logit_softcapping': said.get('attn_logit_softcapping', 50.0),
    'final_logit_softcapping': said.get('final_logit_softcapping', 30.0),
  }


_SCALING = {
  'factor': 'factor',
  'original_max_position_embeddings': 'original_context_length',
  'beta_fast': 'yarn_beta_fast',
  'beta_slow': 'yarn_beta_slow',
  'attention_factor': 'yarn_attn_factor',
}


def _rope(said: Mapping[str, Any], head_dim: int, factors) -> dict[str, Any]:
  """Hugging Face's `rope_parameters`."""
  theta = said.get('rope.freq_base', 10000.0)
  # Files from before the other keys have this one, of linear scaling.
  if 'rope.scale_linear' in said:
    said = {'rope.scaling.factor': said['rope.scale_linear']} | dict(said)
  # llama.cpp takes a factor without a type for linear, and 0 for none.
  factor = said.get('rope.scaling.factor') or 1
  usual = 'none' if factor == 1 else 'linear'
  kind = said.get('rope.scaling.type', usual)
  found = {
    theirs: said[f'rope.scaling.{name}']
    for theirs, name in _SCALING.items()
    if f'rope.scaling.{name}' in said
  }
  if factors is not None and not np.allclose(factors, 1):
    return _llama3(theta, head_dim, np.asarray(factors, np.float64))
  if kind == 'none':
    kind, found = 'default', {}
  return {'rope_type': kind, 'rope_theta': theta, **found}


def _llama3(theta: float, head_dim: int, factors) -> dict[str, Any]:
  """What gives the factors that a file has in place of Llama 3.1's numbers.

  Between the long waves and the short ones the share that is kept is linear
  in the frequency. Only high / low and original / low can be told from it:
  low is 1, as in every release.
  """
  plain, _ = frequencies(Rope(theta=theta), head_dim)
  factor, high, original = factors.max(), 4.0, 8192.0
  between = (factors > 1.001) & (factors < factor * 0.999)
  if between.sum() > 1:
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(plain[between], share[between], 1)
    high, original = 1 - 1 / start, -slope / start * 2 * np.pi
  said = Rope(theta, 'llama3', factor, round(original), 1.0, high)
  made, _ = frequencies(said, head_dim)
  if not np.allclose(plain / factors, made, rtol=1e-3):
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
