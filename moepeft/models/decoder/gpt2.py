# SPDX-License-Identifier: Apache-2.0
"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask
Learners"): learned positions, centred norms, biases, one array for q, k, v."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.config import from_fields as from_fields
from moepeft.models.decoder.hf_config import (
  ACTIVATIONS,
  activation_to_hf,
  in_layers,
  projections,
  released,
)
from moepeft.models.decoder.model import MODULE as MODULE
from moepeft.models.decoder.model import sites as sites
from moepeft.models.hf_layout import Layout
from moepeft.models.weight_mapping import CheckpointError, Rule

HF_TYPES = ('gpt2',)
# Whether the head is the embedding where config.json is silent.
TIED = True
LAYOUT = Layout(
  head='lm_head.weight',
  embedding='transformer.wte.weight',
  prefix='transformer.',
  # The causal mask, which older files keep.
  ignored=r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',
)
_SIZE = DecoderConfig(
  family='gpt2',
  vocab=50257,
  gated=False,
  activation='gelu',
  tied=True,
  positions='learned',
  length=1024,
  centred=True,
  eps=1e-5,
  attention_bias=True,
  out_bias=True,
  mlp_bias=True,
)


def _gpt2(d_model, heads, layers) -> DecoderConfig:
  return dataclasses.replace(
    _SIZE,
    d_model=d_model,
    heads=heads,
    kv_heads=heads,
    ffn=4 * d_model,
    layers=layers,
  )


# From the models' own config.json; 'tiny' is ours, for bytes.
SIZES = {
  'tiny': dataclasses.replace(
    _gpt2(128, 4, 4), vocab=259, head_dim=32, length=512
  ),
  'small': _gpt2(768, 12, 12),
  'medium': _gpt2(1024, 16, 24),
  'large': _gpt2(1280, 20, 36),
  'xl': _gpt2(1600, 25, 48),
}

_MODULES = {
  'self/q': 'attn.c_attn',
  'self/k': 'attn.c_attn',
  'self/v': 'attn.c_attn',
  'self/o': 'attn.c_proj',
  'mlp/wi': 'mlp.c_fc',
  'mlp/wo': 'mlp.c_proj',
}
_NORMS = {'decoder/self/norm': 'ln_1', 'decoder/mlp/norm': 'ln_2'}

config = functools.partial(released, 'GPT-2', SIZES)


def hf_module(site: str) -> str:
  """'decoder/self/o' -> 'transformer.h.{l}.attn.c_proj'.

  q, k and v are parts of one module, `c_attn`.
  """
  return f'transformer.h.{{l}}.{_MODULES[site.removeprefix("decoder/")]}'


def hf_rules(config: DecoderConfig) -> tuple[Rule, ...]:
  """Rules for `GPT2LMHeadModel`; kernels are [in, out]."""
  rules = [
    Rule('embed/embedding', LAYOUT.embedding, 'vd', 'vd'),
    Rule('positions/embedding', 'transformer.wpe.weight', 'pd', 'pd'),
  ]
  for site, (inner, outer) in projections(config).items():
    rules += _projection(site, inner, outer)
  for site, name in _NORMS.items():
    rules += _norm(in_layers(site), f'transformer.h.{{l}}.{name}')
  rules += _norm('decoder/norm', 'transformer.ln_f')
  if not config.tied:
    rules.append(Rule('head/kernel', LAYOUT.head, 'dv', 'vd'))
  return tuple(rules)


def _projection(site: str, inner: str, outer: str) -> list[Rule]:
  ours, theirs = in_layers(site), hf_module(site)
  part, joined = (0, 1), f'({outer})'
  if theirs.endswith('c_attn'):
    part, joined = ('qkv'.index(site[-1]), 3), f'(*{outer})'
  weight, bias = f'{theirs}.weight', f'{theirs}.bias'
  return [
    Rule(f'{ours}/kernel', weight, inner + outer, f'({inner}){joined}', part),
    Rule(f'{ours}/bias', bias, outer, joined, part),
  ]


def _norm(ours: str, theirs: str) -> list[Rule]:
  return [
    Rule(f'{ours}/scale', f'{theirs}.weight', 'd', 'd'),
    Rule(f'{ours}/bias', f'{theirs}.bias', 'd', 'd'),
  ]


def from_hf(fields: Mapping[str, Any], tied: bool) -> DecoderConfig:
  """Reads a `config.json`.

  Raises:
    CheckpointError: a size is absent, or an option is one that is not
      supported.
  """
  wanted = ('vocab_size', 'n_embd', 'n_head', 'n_layer')
  absent = [key for key in wanted if fields.get(key) is None]
  if absent:
    raise CheckpointError(
      f'config.json lacks {", ".join(absent)}: expected the config of a gpt2 '
      'model; write it again with save_pretrained'
    )
  for key in ('scale_attn_by_inverse_layer_idx', 'add_cross_attention'):
    if fields.get(key):
      raise CheckpointError(
        f'config.json has {key}: expected a GPT-2 without it; it is not '
        'supported'
      )
  d_model, heads = fields['n_embd'], fields['n_head']
  return dataclasses.replace(
    _SIZE,
    vocab=fields['vocab_size'],
    d_model=d_model,
    heads=heads,
    kv_heads=heads,
    head_dim=d_model // heads,
    ffn=fields.get('n_inner') or 4 * d_model,
    layers=fields['n_layer'],
    activation=_activation(fields.get('activation_function', 'gelu_new')),
    tied=tied,
    length=fields.get('n_positions', 1024),
    eps=fields.get('layer_norm_epsilon', 1e-5),
    scale=0.0 if fields.get('scale_attn_weights', True) else 1.0,
  )


def _activation(name: str) -> str:
  if name not in ACTIVATIONS:
    raise CheckpointError(
      f'the activation {name!r} in config.json: expected one of '
      f'{", ".join(ACTIVATIONS)}; others are not supported'
    )
  return ACTIVATIONS[name]


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json`."""
  return {
    'architectures': ['GPT2LMHeadModel'],
    'model_type': 'gpt2',
    'vocab_size': config.vocab,
    'n_embd': config.d_model,
    'n_head': config.heads,
    'n_inner': config.ffn,
    'n_layer': config.layers,
    'n_positions': config.length,
    # Of older files, where llama.cpp's converter looks for it.
    'n_ctx': config.length,
    'activation_function': activation_to_hf(config),
    'layer_norm_epsilon': config.eps,
    'scale_attn_weights': config.scale != 1.0,
    'tie_word_embeddings': config.tied,
  }
