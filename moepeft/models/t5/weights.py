# SPDX-License-Identifier: Apache-2.0
"""Maps T5's arrays and config to Hugging Face's and T5X's.

T5X uses flaxformer's model. `moepeft.checkpoints.t5x.adapters` maps the
adapters of the released code. The axis letter p is for buckets of relative
positions.
"""

import re
from collections.abc import Mapping
from typing import Any

from moepeft.models.hf_tensor_names import TensorNames
from moepeft.models.t5.model import T5Config
from moepeft.models.weight_mapping import (
  CheckpointError,
  Rule,
  Shape,
  path_in_layers,
)

# Sublayers in the order of Hugging Face's `layer.<i>`, with the module's names
# there and in T5X.
SUBLAYERS = {
  'encoder': {
    'self': ('SelfAttention', 'attention'),
    'mlp': ('DenseReluDense', 'mlp'),
  },
  'decoder': {
    'self': ('SelfAttention', 'self_attention'),
    'cross': ('EncDecAttention', 'encoder_decoder_attention'),
    'mlp': ('DenseReluDense', 'mlp'),
  },
}
_T5X_PROJECTIONS = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out'}
_T5X_NORMS = {
  'encoder/self': 'pre_attention_layer_norm',
  'encoder/mlp': 'pre_mlp_layer_norm',
  'decoder/self': 'pre_self_attention_layer_norm',
  'decoder/cross': 'pre_cross_attention_layer_norm',
  'decoder/mlp': 'pre_mlp_layer_norm',
}
# Duplicates of shared.weight, and an unused bias in T5 1.0's files.
_IGNORED = (
  r'(encoder|decoder)\.embed_tokens\.weight',
  r'decoder\.block\.0\.layer\.1\.EncDecAttention\.'
  r'relative_attention_bias\.weight',
)
TENSOR_NAMES = TensorNames(
  head='lm_head.weight',
  embedding='shared.weight',
  ignored='|'.join(_IGNORED),
)


def axis_sizes(config: T5Config) -> dict[str, int]:
  """The size of each axis letter."""
  return {
    'v': config.vocab,
    'd': config.d_model,
    'n': config.heads,
    'h': config.head_dim,
    'f': config.ffn,
    'p': config.buckets,
  }


def depths(config: T5Config) -> dict[str, int]:
  """Layers of each stack."""
  return {'encoder': config.encoder_layers, 'decoder': config.decoder_layers}


def projections(config: T5Config) -> dict[str, tuple[str, str]]:
  """Every projection's site and its (input, output) axes, in model order."""
  attention = dict.fromkeys('qkv', ('d', 'nh')) | {'o': ('nh', 'd')}
  gates = ('wi_0', 'wi_1') if config.gated else ('wi',)
  mlp = dict.fromkeys(gates, ('d', 'f')) | {'wo': ('f', 'd')}
  return {
    f'{stack}/{sub}/{name}': axes
    for stack, subs in SUBLAYERS.items()
    for sub in subs
    for name, axes in (mlp if sub == 'mlp' else attention).items()
  }


def hf_module(site: str, config: T5Config) -> str:
  """'encoder/self/q' -> 'encoder.block.{l}.layer.0.SelfAttention.q'."""
  del config
  if site == 'head':
    return TENSOR_NAMES.head.removesuffix('.weight')
  stack, sub, name = site.split('/')
  index = list(SUBLAYERS[stack]).index(sub)
  module = SUBLAYERS[stack][sub][0]
  return f'{stack}.block.{{l}}.layer.{index}.{module}.{name}'


def hf_rules(config: T5Config) -> tuple[Rule, ...]:
  """Rules for `T5ForConditionalGeneration`; its kernels are [out, in]."""
  rules = [Rule('embed/embedding', TENSOR_NAMES.embedding, 'vd', 'vd')]
  for site, (input_axes, output_axes) in projections(config).items():
    name, stored_name = (
      path_in_layers(site) + '/kernel',
      hf_module(site, config) + '.weight',
    )
    rules.append(
      Rule(
        name,
        stored_name,
        input_axes + output_axes,
        f'({output_axes})({input_axes})',
      )
    )
  for stack, subs in SUBLAYERS.items():
    for i, sub in enumerate(subs):
      name = f'{stack}/layers/{{l}}/{sub}/norm/scale'
      stored_name = f'{stack}.block.{{l}}.layer.{i}.layer_norm.weight'
      rules.append(Rule(name, stored_name, 'd', 'd'))
    bias = 'block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    rules += [
      Rule(f'{stack}/relpos/embedding', f'{stack}.{bias}', 'pn', 'pn'),
      Rule(f'{stack}/norm/scale', f'{stack}.final_layer_norm.weight', 'd', 'd'),
    ]
  if not config.tied:
    rules.append(Rule('head/kernel', TENSOR_NAMES.head, 'dv', 'vd'))
  return tuple(rules)


def t5x_module(site: str) -> str:
  """'encoder/self/q' -> 'encoder/layers_{l}/attention/query'."""
  stack, sub, name = site.split('/')
  module = SUBLAYERS[stack][sub][1]
  return f'{stack}/layers_{{l}}/{module}/{_T5X_PROJECTIONS.get(name, name)}'


def t5x_rules(config: T5Config) -> tuple[Rule, ...]:
  """Rules for flaxformer's T5 in T5X; its kernels are [in, out]."""
  rules = [Rule('embed/embedding', 'token_embedder/embedding', 'vd', 'vd')]
  for site, (input_axes, output_axes) in projections(config).items():
    name, stored_name = (
      path_in_layers(site) + '/kernel',
      t5x_module(site) + '/kernel',
    )
    rules.append(
      Rule(
        name,
        stored_name,
        input_axes + output_axes,
        f'({input_axes})({output_axes})',
      )
    )
  for sublayer, norm in _T5X_NORMS.items():
    stack, sub = sublayer.split('/')
    name = f'{stack}/layers/{{l}}/{sub}/norm/scale'
    rules.append(Rule(name, f'{stack}/layers_{{l}}/{norm}/scale', 'd', 'd'))
  for stack in SUBLAYERS:
    bias = f'{stack}/relpos_bias/rel_embedding'
    norm = f'{stack}/{stack}_norm/scale'
    rules += [
      Rule(f'{stack}/relpos/embedding', bias, 'pn', 'np'),
      Rule(f'{stack}/norm/scale', norm, 'd', 'd'),
    ]
  if not config.tied:
    head = 'decoder/logits_dense/kernel'
    rules.append(Rule('head/kernel', head, 'dv', 'dv'))
  return tuple(rules)


def from_hf_fields(fields: Mapping[str, Any], tied: bool) -> T5Config:
  """Reads `config.json`.

  Args:
    fields: its content.
    tied: whether the files have no separate head. As in transformers 5, this
      decides, not `tie_word_embeddings`.

  Raises:
    CheckpointError: a size is missing, or the activation is not supported.
  """
  missing = [key for key in _HF_SIZES.values() if fields.get(key) is None]
  if missing:
    raise CheckpointError(
      f'config.json lacks {", ".join(missing)}: expected the config of a T5; '
      'write it again with save_pretrained'
    )
  start_token = fields.get('decoder_start_token_id')
  if start_token:
    raise CheckpointError(
      f'config.json has decoder_start_token_id {start_token}: expected 0, the '
      'id of padding; other start tokens are not supported'
    )
  multilingual = fields.get('model_type') == 'mt5'
  default = 'gated-gelu' if multilingual else 'relu'
  projection = fields.get('feed_forward_proj') or default
  gated, activation = _activation(projection)
  scales_head = _mt5_scales_head if multilingual else _scales_head
  layers = fields['num_layers']
  optional = {
    name: fields[hf_name]
    for name, hf_name in _HF_OPTIONAL.items()
    if fields.get(hf_name) is not None
  }
  return T5Config(
    **{name: fields[hf_name] for name, hf_name in _HF_SIZES.items()},
    **optional,
    decoder_layers=fields.get('num_decoder_layers') or layers,
    gated=gated,
    activation=activation,
    tied=tied,
    scale_head=scales_head(fields, tied),
  )


def _scales_head(fields: Mapping[str, Any], tied: bool) -> bool:
  """Whether a T5 scales its head's input.

  In files of transformers 4, `tie_word_embeddings` says so, even for an untied
  head. Version 5 always writes `true` and adds `scale_decoder_outputs`.
  """
  del tied
  default = fields.get('tie_word_embeddings') is not False
  scales_head = fields.get('scale_decoder_outputs')
  return default if scales_head is None else scales_head


def _mt5_scales_head(fields: Mapping[str, Any], tied: bool) -> bool:
  """Whether an mT5 scales its head's input.

  transformers 5 never scales, and always writes `tie_word_embeddings: true`.
  Version 4 scales if that is true, and then ties the head.
  """
  major = (fields.get('transformers_version') or '4').partition('.')[0]
  is_stated = fields.get('tie_word_embeddings') is True
  return tied and is_stated and major.isdigit() and int(major) < 5


_HF_SIZES = {
  'vocab': 'vocab_size',
  'd_model': 'd_model',
  'heads': 'num_heads',
  'head_dim': 'd_kv',
  'ffn': 'd_ff',
  'encoder_layers': 'num_layers',
}
_HF_OPTIONAL = {
  'buckets': 'relative_attention_num_buckets',
  'max_distance': 'relative_attention_max_distance',
  'eps': 'layer_norm_epsilon',
  'dropout': 'dropout_rate',
}
# {activation in Hugging Face: key of `nn.mlp.ACTIVATIONS`}; of several names,
# the first one is written.
_ACTIVATIONS = {
  'gelu_new': 'gelu',
  'relu': 'relu',
  'gelu': 'gelu_exact',
  'silu': 'silu',
  'gelu_pytorch_tanh': 'gelu',
}
# In T5, this is the tanh approximation of GELU.
_GATED_GELU = 'gated-gelu'


def _activation(projection: str) -> tuple[bool, str]:
  """(gated, activation) of `feed_forward_proj`."""
  if projection == _GATED_GELU:
    return True, 'gelu'
  name = projection.removeprefix('gated-')
  if name not in _ACTIVATIONS:
    raise CheckpointError(
      f'feed_forward_proj {projection!r} in config.json: expected one of '
      f"{', '.join(_ACTIVATIONS)}, perhaps after 'gated-'; other activations "
      'are not supported'
    )
  return name != projection, _ACTIVATIONS[name]


def _projection_to_hf(config: T5Config) -> str:
  """The field `feed_forward_proj` of a config.

  Raises:
    CheckpointError: transformers has no such projection.
  """
  if config.gated and config.activation == 'gelu':
    return _GATED_GELU
  if config.gated and config.activation == 'gelu_exact':
    raise CheckpointError(
      "Hugging Face's T5 does not support an exact gated GELU ('gated-gelu' is "
      "the tanh approximation): use moepeft's own checkpoints"
    )
  name = next(
    hf_name
    for hf_name, activation in _ACTIVATIONS.items()
    if activation == config.activation
  )
  return f'gated-{name}' if config.gated else name


def to_hf_fields(config: T5Config) -> dict[str, Any]:
  """The content of a `config.json` that transformers 4 and 5 read."""
  fields = _HF_SIZES | _HF_OPTIONAL | {'decoder_layers': 'num_decoder_layers'}
  return {
    'architectures': ['T5ForConditionalGeneration'],
    'model_type': 't5',
    'is_encoder_decoder': True,
    'pad_token_id': 0,
    'eos_token_id': 1,
    'decoder_start_token_id': 0,
    'feed_forward_proj': _projection_to_hf(config),
    'tie_word_embeddings': config.tied,
    'scale_decoder_outputs': config.scale_head,
    **{key: getattr(config, name) for name, key in fields.items()},
  }


def config_from_t5x(shapes: Mapping[str, Shape]) -> T5Config:
  """Infers the config from the arrays' shapes, as T5X's checkpoints lack it.

  The relative position bias gives the number of heads, which divide the width
  of the query. A gated feed-forward has the gelu of 1.1, others the relu of
  1.0. A tied head is scaled, as in flaxformer.

  Raises:
    CheckpointError: a necessary array is missing.
  """
  names = {
    'embed': 'token_embedder/embedding',
    'bias': 'encoder/relpos_bias/rel_embedding',
    'query': 'encoder/layers_0/attention/query/kernel',
    'wo': 'encoder/layers_0/mlp/wo/kernel',
  }
  missing = [name for name in names.values() if name not in shapes]
  if missing:
    raise CheckpointError(
      f'no {", ".join(missing)} among the {len(shapes)} arrays: expected the '
      "names of flaxformer's T5 without scanned layers; other models are not "
      'supported'
    )
  embed, bias, query, wo = (shapes[name] for name in names.values())
  gated = 'encoder/layers_0/mlp/wi_0/kernel' in shapes
  tied = 'decoder/logits_dense/kernel' not in shapes
  return T5Config(
    vocab=embed[0],
    d_model=embed[1],
    heads=bias[0],
    head_dim=query[-1] // bias[0],
    ffn=wo[0],
    encoder_layers=_layers(shapes, 'encoder'),
    decoder_layers=_layers(shapes, 'decoder'),
    gated=gated,
    activation='gelu' if gated else 'relu',
    tied=tied,
    scale_head=tied,
    buckets=bias[1],
  )


def _layers(shapes: Mapping[str, Shape], stack: str) -> int:
  matches = [re.match(rf'{stack}/layers_(\d+)/', name) for name in shapes]
  return 1 + max((int(match[1]) for match in matches if match), default=-1)
