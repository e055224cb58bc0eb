# SPDX-License-Identifier: Apache-2.0
"""Small random models whose every size differs, so that no axis can hide."""

import itertools

import numpy as np

from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.t5x import adapters as t5x_adapters
from moepeft.models import by_model_type, weight_mapping
from moepeft.models.t5 import weights as t5_weights
from moepeft.models.t5.model import T5Config


def _config(gated: bool, tied: bool) -> T5Config:
  return T5Config(
    vocab=29,
    d_model=11,
    heads=3,
    head_dim=5,
    ffn=13,
    encoder_layers=2,
    decoder_layers=4,
    gated=gated,
    activation='gelu' if gated else 'relu',
    tied=tied,
    scale_head=tied,
    buckets=6,
  )


CONFIGS = {
  f'{"gated" if gated else "plain"}-{"tied" if tied else "untied"}': _config(
    gated, tied
  )
  for gated, tied in itertools.product((True, False), repeat=2)
}


def config_from_hf(fields, tied):
  """The config that a config.json gives."""
  return by_model_type()[fields['model_type']].hf.from_fields(fields, tied)


_DECODER = {
  'vocab_size': 29,
  'hidden_size': 12,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'head_dim': 4,
  'intermediate_size': 13,
  'num_hidden_layers': 3,
  'max_position_embeddings': 64,
}
# By what is special about each: biases everywhere, biases of q, k and v,
# normed heads, norms after sublayers.
DECODERS = {
  kind: config_from_hf(
    _DECODER | {'model_type': kind, **more}, tied=kind == 'gemma2'
  )
  for kind, more in {
    'llama': {'attention_bias': True, 'mlp_bias': True},
    'qwen2': {},
    'qwen3': {},
    'gemma2': {'query_pre_attn_scalar': 4, 'sliding_window': 3},
  }.items()
}
# One array for q, k and v, kernels [in, out].
_GPT2 = {
  'model_type': 'gpt2',
  'vocab_size': 29,
  'n_embd': 12,
  'n_head': 3,
  'n_layer': 2,
  'n_inner': 13,
  'n_positions': 16,
}
GPT2 = config_from_hf(_GPT2, tied=True)


def random_tree(shapes, seed=0):
  """A nested dict of float32 arrays of {path: shape}.

  Not so large that attention saturates, where float32 would lose digits.
  """
  rng = np.random.default_rng(seed)
  return weight_mapping.unflatten(
    {
      path: rng.normal(scale=0.5, size=shape).astype(np.float32)
      for path, shape in shapes.items()
    }
  )


def random_params(config, seed=0):
  """Random parameters of a model of any family."""
  expected = hf.model_entries(config)
  shapes = weight_mapping.stacked_shapes(expected)
  return random_tree(shapes, seed)


def adapter_tree(config, leaves, sites, seed=1):
  """A random 'peft' tree.

  Args:
    leaves: {'lora/a': '{in}r'}: axes, {in} and {out} standing for the site's.
    sites: of the model; e is 2 and r 7.
  """
  family = hf.family_of(config)
  sizes = family.axis_sizes(config) | {'e': 2, 'r': 7}
  depths = family.depths(config)
  known = family.projections(config) | family.activations(config)
  shapes = {}
  for site in sites:
    stack, rest = site.split('/', 1)
    inner, outer = known[site]
    for leaf, axes in leaves.items():
      axes = axes.replace('{in}', inner).replace('{out}', outer)
      shape = (depths[stack], *weight_mapping.axes_shape(axes, sizes))
      shapes[f'{stack}/layers/{rest}/{leaf}'] = shape
  return random_tree(shapes, seed)


def assert_equal_trees(left, right):
  """Same paths, shapes, dtypes and bits."""
  left, right = weight_mapping.flatten(left), weight_mapping.flatten(right)
  assert left.keys() == right.keys()
  for path, leaf in left.items():
    assert leaf.dtype == right[path].dtype, path
    np.testing.assert_array_equal(leaf, right[path], err_msg=path)


def released_arrays(config, adapter=None):
  """Random parameters and an adapter's as `t5x.save` writes them, by name."""
  sizes, depths = t5_weights.axis_sizes(config), t5_weights.depths(config)
  expected = weight_mapping.entries(t5_weights.t5x_rules(config), sizes, depths)
  pairs = list(weight_mapping.write(expected, sizes, random_params(config)))
  if adapter is not None:
    pairs += t5x_adapters.write(config, adapter)
  return {entry.stored_name: array for entry, array in pairs}
