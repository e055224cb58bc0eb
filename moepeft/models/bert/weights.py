# SPDX-License-Identifier: Apache-2.0
"""Maps BERT's arrays and config to Hugging Face's files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moepeft.models import weight_mapping
from moepeft.models.bert.model import BertConfig
from moepeft.models.decoder.hf_config import (
  activation_from_hf,
  activation_to_hf,
)
from moepeft.models.hf_tensor_names import TensorNames
from moepeft.models.weight_mapping import CheckpointError, Rule, path_in_layers

_HEAD = 'cls.predictions'
_BIASES = {True: f'{_HEAD}.bias', False: f'{_HEAD}.decoder.bias'}
TENSOR_NAMES = TensorNames(
  head=f'{_HEAD}.decoder.weight',
  embedding='bert.embeddings.word_embeddings.weight',
  prefix='bert.',
  # Constants, and the next sentence prediction head.
  ignored=r'bert\.embeddings\.(position|token_type)_ids'
  r'|cls\.seq_relationship\.(weight|bias)',
  renamed={
    'LayerNorm.gamma': 'LayerNorm.weight',
    'LayerNorm.beta': 'LayerNorm.bias',
  },
  parts={
    'pooler': 'bert.pooler.dense.weight',
    'masked': f'{_HEAD}.transform.dense.weight',
  },
)

_MODULES = {
  'self/q': 'attention.self.query',
  'self/k': 'attention.self.key',
  'self/v': 'attention.self.value',
  'self/o': 'attention.output.dense',
  'mlp/wi': 'intermediate.dense',
  'mlp/wo': 'output.dense',
}
_NORMS = {
  'encoder/self/norm': 'attention.output.LayerNorm',
  'encoder/mlp/norm': 'output.LayerNorm',
}


def axis_sizes(config: BertConfig) -> dict[str, int]:
  """The size of each axis letter."""
  return {
    'v': config.vocab,
    'd': config.d_model,
    'c': config.d_model,
    'n': config.heads,
    'h': config.head_dim,
    'f': config.ffn,
    'p': config.length,
    'y': config.types,
  }


def tensor_names(fields: Mapping[str, Any]) -> TensorNames:
  """See `family.HuggingFaceFormat`."""
  # A tied head has one bias, which older files store twice. An untied head has
  # two biases, of which only the decoder's is used.
  tied = fields.get('tie_word_embeddings') is not False
  unused = _BIASES[not tied].replace('.', r'\.')
  return dataclasses.replace(
    TENSOR_NAMES, ignored=f'{TENSOR_NAMES.ignored}|{unused}'
  )


def depths(config: BertConfig) -> dict[str, int]:
  """Layers of each stack."""
  return {'encoder': config.layers}


def projections(config: BertConfig) -> dict[str, tuple[str, str]]:
  """Every projection's site and its (input, output) axes, in model order."""
  del config
  attention = dict.fromkeys('qkv', ('d', 'nh')) | {'o': ('nh', 'd')}
  mlp = {'wi': ('d', 'f'), 'wo': ('f', 'd')}
  sites = {f'encoder/self/{name}': axes for name, axes in attention.items()}
  return sites | {f'encoder/mlp/{name}': axes for name, axes in mlp.items()}


def hf_module(site: str, config: BertConfig) -> str:
  """'encoder/self/q' -> 'encoder.layer.{l}.attention.self.query'.

  The name starts with 'bert.' if there is a head.
  """
  name = _MODULES[site.removeprefix('encoder/')]
  return f'{_prefix(config)}encoder.layer.{{l}}.{name}'


def hf_modules(config: BertConfig) -> set[str]:
  """Every module with a weight, 'encoder.layer.0.attention.self.query'."""
  names = weight_mapping.module_names(
    hf_rules(config), axis_sizes(config), depths(config)
  )
  return {
    _prefix(config) + name.removeprefix(TENSOR_NAMES.prefix)
    for name in names
    if not name.startswith(_HEAD)
  }


def _prefix(config: BertConfig) -> str:
  return TENSOR_NAMES.prefix if config.masked else ''


def hf_rules(config: BertConfig) -> tuple[Rule, ...]:
  """Rules for `BertModel` or `BertForMaskedLM`; kernels are [out, in]."""
  rules = [
    Rule('embed/embedding', TENSOR_NAMES.embedding, 'vd', 'vd'),
    _embedding('positions', 'position', 'p'),
    _embedding('types', 'token_type', 'y'),
    *_norm('embed_norm', 'bert.embeddings.LayerNorm'),
  ]
  for site, axes in projections(config).items():
    name = _MODULES[site.removeprefix('encoder/')]
    rules += _dense(
      path_in_layers(site), f'bert.encoder.layer.{{l}}.{name}', *axes
    )
  for site, name in _NORMS.items():
    rules += _norm(path_in_layers(site), f'bert.encoder.layer.{{l}}.{name}')
  if config.pooler:
    rules += _dense('pooler', 'bert.pooler.dense', 'd', 'c')
  if config.masked:
    rules += _dense('transform', f'{_HEAD}.transform.dense', 'd', 'c')
    rules += _norm('transform_norm', f'{_HEAD}.transform.LayerNorm')
    rules.append(Rule('head/bias', _BIASES[config.tied], 'v', 'v'))
    if not config.tied:
      rules.append(Rule('head/kernel', TENSOR_NAMES.head, 'dv', 'vd'))
  return tuple(rules)


def _embedding(name: str, stored_name: str, letter: str) -> Rule:
  stored_name = f'bert.embeddings.{stored_name}_embeddings.weight'
  return Rule(f'{name}/embedding', stored_name, f'{letter}d', f'{letter}d')


def _dense(
  path: str, module: str, input_axes: str, output_axes: str
) -> list[Rule]:
  weight, bias = f'{module}.weight', f'{module}.bias'
  return [
    Rule(
      f'{path}/kernel',
      weight,
      input_axes + output_axes,
      f'({output_axes})({input_axes})',
    ),
    Rule(f'{path}/bias', bias, output_axes, f'({output_axes})'),
  ]


def _norm(path: str, module: str) -> list[Rule]:
  return [
    Rule(f'{path}/scale', f'{module}.weight', 'd', 'd'),
    Rule(f'{path}/bias', f'{module}.bias', 'd', 'd'),
  ]


_SIZES = {
  'vocab': 'vocab_size',
  'd_model': 'hidden_size',
  'heads': 'num_attention_heads',
  'ffn': 'intermediate_size',
  'layers': 'num_hidden_layers',
}
_OPTIONAL = {
  'length': 'max_position_embeddings',
  'types': 'type_vocab_size',
  'eps': 'layer_norm_eps',
  'dropout': 'hidden_dropout_prob',
}


def from_hf_fields(fields: Mapping[str, Any], tied: bool) -> BertConfig:
  """Reads a `config.json`.

  The pooler and the head are detected by `TENSOR_NAMES.parts`.

  Raises:
    CheckpointError: a size is missing, or an option is not supported.
  """
  missing = [key for key in _SIZES.values() if fields.get(key) is None]
  if missing:
    raise CheckpointError(
      f'config.json lacks {", ".join(missing)}: expected the config of a BERT; '
      'write it again with save_pretrained'
    )
  _check(fields)
  optional = {
    name: fields[hf_name]
    for name, hf_name in _OPTIONAL.items()
    if fields.get(hf_name) is not None
  }
  return BertConfig(
    **{name: fields[hf_name] for name, hf_name in _SIZES.items()},
    **optional,
    activation=activation_from_hf(fields.get('hidden_act', 'gelu')),
    tied=bool(tied),
  )


def _check(fields: Mapping[str, Any]) -> None:
  for key in ('is_decoder', 'add_cross_attention'):
    if fields.get(key):
      raise CheckpointError(
        f'config.json has {key}: expected an encoder; BERT decoders are not '
        'supported'
      )
  positions = fields.get('position_embedding_type') or 'absolute'
  if positions != 'absolute':
    raise CheckpointError(
      f'config.json has position_embedding_type {positions!r}: expected '
      "'absolute'; others are not supported"
    )
  width, heads = fields['hidden_size'], fields['num_attention_heads']
  if width % heads:
    raise CheckpointError(
      f'config.json has hidden_size {width} and {heads} heads: expected a '
      'multiple of the heads; the file is damaged'
    )


def to_hf_fields(config: BertConfig) -> dict[str, Any]:
  """The content of a `config.json`."""
  kind = 'BertForMaskedLM' if config.masked else 'BertModel'
  fields = _SIZES | _OPTIONAL
  return {
    'architectures': [kind],
    'model_type': 'bert',
    'hidden_act': activation_to_hf(config),
    'attention_probs_dropout_prob': config.dropout,
    'position_embedding_type': 'absolute',
    'tie_word_embeddings': config.tied,
    **{key: getattr(config, field) for field, key in fields.items()},
  }
