# SPDX-License-Identifier: Apache-2.0
"""What decoders' arrays are called in Hugging Face's Llama form, and what
its `config.json` says. Mistral, Qwen and Gemma share it; see their files."""

from collections.abc import Mapping
from typing import Any

from moepeft.core.ranges import suggestion
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.hf_rope import rope_from_hf, rope_to_hf
from moepeft.models.hf_layout import Layout
from moepeft.models.weight_mapping import CheckpointError, Rule

LAYOUT = Layout(
  head='lm_head.weight',
  embedding='model.embed_tokens.weight',
  prefix='model.',
  # Frequencies of RoPE, which older files keep.
  ignored=r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq',
)

_MODULES = {
  'self/q': 'self_attn.q_proj',
  'self/k': 'self_attn.k_proj',
  'self/v': 'self_attn.v_proj',
  'self/o': 'self_attn.o_proj',
  'mlp/wi_0': 'mlp.gate_proj',
  'mlp/wi_1': 'mlp.up_proj',
  'mlp/wo': 'mlp.down_proj',
}
ACTIVATIONS = {
  'silu': 'silu',
  'gelu_pytorch_tanh': 'gelu',
  'gelu_new': 'gelu',
  'gelu': 'gelu_exact',
  'relu': 'relu',
}


def sizes(config: DecoderConfig) -> dict[str, int]:
  """The size of each axis letter."""
  return {
    'v': config.vocab,
    'd': config.d_model,
    'n': config.heads,
    'k': config.kv_heads,
    'h': config.head_dim,
    'f': config.ffn,
    'p': config.length,
  }


def depths(config: DecoderConfig) -> dict[str, int]:
  """Layers of each stack."""
  return {'decoder': config.layers}


def projections(config: DecoderConfig) -> dict[str, tuple[str, str]]:
  """Every projection's site and its (input, output) axes, in model order."""
  attention = {
    'q': ('d', 'nh'),
    'k': ('d', 'kh'),
    'v': ('d', 'kh'),
    'o': ('nh', 'd'),
  }
  gates = ('wi_0', 'wi_1') if config.gated else ('wi',)
  mlp = dict.fromkeys(gates, ('d', 'f')) | {'wo': ('f', 'd')}
  found = {f'decoder/self/{name}': axes for name, axes in attention.items()}
  return found | {f'decoder/mlp/{name}': axes for name, axes in mlp.items()}


def biased(config: DecoderConfig) -> set[str]:
  """The projections that have a bias."""
  found = {f'decoder/self/{name}' for name in 'qkv' if config.attention_bias}
  if config.out_bias:
    found.add('decoder/self/o')
  if config.mlp_bias:
    found |= {site for site in projections(config) if '/mlp/' in site}
  return found


def taps() -> dict[str, tuple[str, str]]:
  """The weightless sites inside the feed-forward, as `projections`."""
  return {f'decoder/mlp/{tap}': ('f', 'f') for tap in ('act', 'hidden')}


def in_layers(site: str) -> str:
  """'decoder/self/q' -> 'decoder/layers/{l}/self/q'."""
  stack, rest = site.split('/', 1)
  return f'{stack}/layers/{{l}}/{rest}'


def hf_module(site: str) -> str:
  """'decoder/self/q' -> 'model.layers.{l}.self_attn.q_proj'."""
  return f'model.layers.{{l}}.{_MODULES[site.removeprefix("decoder/")]}'


def hf_norms(config: DecoderConfig) -> dict[str, str]:
  """Norms within a layer, by our site."""
  if config.post_norms:
    return {
      'decoder/self/norm': 'input_layernorm',
      'decoder/self_post_norm': 'post_attention_layernorm',
      'decoder/mlp/norm': 'pre_feedforward_layernorm',
      'decoder/mlp_post_norm': 'post_feedforward_layernorm',
    }
  return {
    'decoder/self/norm': 'input_layernorm',
    'decoder/mlp/norm': 'post_attention_layernorm',
  }


def hf_rules(config: DecoderConfig) -> tuple[Rule, ...]:
  """Rules for `LlamaForCausalLM` and its like; kernels are [out, in]."""
  rules = [Rule('embed/embedding', LAYOUT.embedding, 'vd', 'vd')]
  with_bias = biased(config)
  for site, (inner, outer) in projections(config).items():
    ours, theirs = in_layers(site), hf_module(site)
    rules.append(
      Rule(
        f'{ours}/kernel',
        f'{theirs}.weight',
        inner + outer,
        f'({outer})({inner})',
      )
    )
    if site in with_bias:
      rules.append(Rule(f'{ours}/bias', f'{theirs}.bias', outer, f'({outer})'))
  for site, name in hf_norms(config).items():
    theirs = f'model.layers.{{l}}.{name}.weight'
    rules.append(Rule(f'{in_layers(site)}/scale', theirs, 'd', 'd'))
  for name in ('q_norm', 'k_norm') if config.qk_norm else ():
    theirs = f'model.layers.{{l}}.self_attn.{name}.weight'
    ours = f'{in_layers(f"decoder/self/{name}")}/scale'
    rules.append(Rule(ours, theirs, 'h', 'h'))
  rules.append(Rule('decoder/norm/scale', 'model.norm.weight', 'd', 'd'))
  if not config.tied:
    rules.append(Rule('head/kernel', LAYOUT.head, 'dv', 'vd'))
  return tuple(rules)


# '1.1' is what a config has that says nothing: T5's.
_NO_VERSION = ('', '1.1')


def released(
  family: str,
  table: Mapping[str, DecoderConfig],
  size: str,
  version: str = '',
) -> DecoderConfig:
  """The configuration of a released size, by its name in a family's table.

  Raises:
    ValueError: there is no such size, or a version is asked for.
  """
  if version not in _NO_VERSION:
    raise ValueError(
      f'{family} has no versions beside its sizes, {", ".join(table)}; got '
      f'config.model.version={version!r}: leave it out'
    )
  if size not in table:
    raise ValueError(
      f'{family} comes as {", ".join(table)}; got {size!r}'
      f'{suggestion(size, table)}'
    )
  return table[size]


def shape_from_hf(
  fields: Mapping[str, Any], family: str, tied: bool, kv_heads: int = 0
) -> DecoderConfig:
  """The options that all families of this form have.

  Args:
    kv_heads: those that transformers takes where the file is silent; 0 for as
      many as heads.

  Raises:
    CheckpointError: a size is absent, or an option is one that is not
      supported.
  """
  wanted = {
    'vocab': 'vocab_size',
    'd_model': 'hidden_size',
    'heads': 'num_attention_heads',
    'ffn': 'intermediate_size',
    'layers': 'num_hidden_layers',
  }
  absent = [key for key in wanted.values() if fields.get(key) is None]
  if absent:
    raise CheckpointError(
      f'config.json lacks {", ".join(absent)}: expected the config of a '
      f'{family} model; write it again with save_pretrained'
    )
  found = {ours: fields[theirs] for ours, theirs in wanted.items()}
  heads = found['heads']
  usual = min(kv_heads, heads) or heads
  return DecoderConfig(
    family=family,
    **found,
    kv_heads=fields.get('num_key_value_heads', usual) or heads,
    head_dim=fields.get('head_dim') or found['d_model'] // heads,
    activation=activation(fields),
    tied=tied,
    length=fields.get('max_position_embeddings', 2048),
    rope=rope_from_hf(fields),
    eps=fields.get('rms_norm_eps', 1e-6),
  )


def shape_to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The content of a `config.json` that all families of this form share."""
  rope = rope_to_hf(config.rope)
  fields = {
    'vocab_size': config.vocab,
    'hidden_size': config.d_model,
    'num_attention_heads': config.heads,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.ffn,
    'num_hidden_layers': config.layers,
    'max_position_embeddings': config.length,
    'rms_norm_eps': config.eps,
    'hidden_act': activation_to_hf(config),
    'tie_word_embeddings': config.tied,
    'rope_parameters': rope,
    # Of transformers 4.
    'rope_theta': config.rope.theta,
  }
  if config.rope.kind != 'default':
    fields['rope_scaling'] = {
      key: value for key, value in rope.items() if key != 'rope_theta'
    }
  return fields


def activation(fields: Mapping[str, Any]) -> str:
  """Ours for 'hidden_activation' or 'hidden_act'."""
  name = fields.get('hidden_activation') or fields.get('hidden_act', 'silu')
  if name not in ACTIVATIONS:
    raise CheckpointError(
      f'the activation {name!r} in config.json: expected one of '
      f'{", ".join(ACTIVATIONS)}; others are not supported'
    )
  return ACTIVATIONS[name]


def activation_to_hf(config: DecoderConfig) -> str:
  """Hugging Face's name of the activation."""
  known = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return known[config.activation]


def windows_from_hf(
  fields: Mapping[str, Any], usual: tuple[bool, ...]
) -> dict[str, Any]:
  """`window` and `windowed` of a family whose layers differ.

  Args:
    usual: whether each layer is windowed where 'layer_types' is not there.
  """
  window = fields.get('sliding_window') or 0
  if not fields.get('use_sliding_window') or not window:
    return {}
  known = {'full_attention': False, 'sliding_attention': True}
  kinds = fields.get('layer_types')
  unknown = sorted(set(kinds or ()) - known.keys())
  if unknown:
    raise CheckpointError(
      f'layers of the type {", ".join(unknown)} in config.json: expected '
      f'{" or ".join(known)}; others are not supported'
    )
  windowed = tuple(known[kind] for kind in kinds) if kinds else usual
  return {'window': window, 'windowed': windowed} if any(windowed) else {}


def windows_to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The fields that `windows_from_hf` reads."""
  windowed = config.windowed or (config.window > 0,) * config.layers
  kinds = {False: 'full_attention', True: 'sliding_attention'}
  return {
    'sliding_window': config.window or None,
    'use_sliding_window': config.window > 0,
    'layer_types': [kinds[layer] for layer in windowed],
  }
