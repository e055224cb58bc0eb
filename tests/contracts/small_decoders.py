# SPDX-License-Identifier: Apache-2.0
"""Small decoder-only models of odd sizes: every family, every position."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.core.types import Context
from moepeft.models.decoder.model import Decoder, DecoderConfig, sites
from moepeft.nn.initializers import init_params
from moepeft.nn.rope import Rope
from moepeft.peft import build

from . import small

# Heads times head size (24) unlike d_model (13), 6 heads on 2, 3 layers.
_LLAMA = DecoderConfig(
  vocab=37,
  d_model=13,
  heads=6,
  kv_heads=2,
  head_dim=4,
  ffn=17,
  layers=3,
  length=19,
)


def _like(family, **changes):
  return dataclasses.replace(_LLAMA, family=family, **changes)


_GPT2 = dict(
  kv_heads=6,
  gated=False,
  activation='gelu',
  tied=True,
  centred=True,
  attention_bias=True,
  out_bias=True,
  mlp_bias=True,
)
_GEMMA = dict(
  kv_heads=1,
  activation='gelu',
  tied=True,
  norm_offset=1.0,
  scale_embedding=True,
)
CONFIGS = {
  'llama': _like('llama', rope=Rope(50.0, 'llama3', 4.0, 9)),
  'mistral': _like('mistral', window=3),
  'qwen2': _like(
    'qwen2', attention_bias=True, window=4, windowed=(False, False, True)
  ),
  'qwen3': _like('qwen3', qk_norm=True, tied=True),
  'gemma': _like('gemma', **_GEMMA),
  'gemma2': _like(
    'gemma',
    **_GEMMA | dict(kv_heads=3),
    post_norms=True,
    attention_cap=2.0,
    logits_cap=3.0,
    window=2,
    windowed=(True, False, True),
    scale=0.3,
  ),
  'gpt2': _like('gpt2', positions='learned', **_GPT2),
  'sinusoidal': _like('gpt2', positions='sinusoidal', d_model=14, **_GPT2),
  'alibi': _like('llama', positions='alibi', window=5),
}
LENGTHS = (11, 4, 7)
# Methods that need a decoder-only model; small.METHODS has the others.
METHODS = ("xlora(experts=3, rank=2, targets='*/v|*/wo')",)


def batch(vocab=37, seed=0):
  """Rows of three lengths, padded at their ends."""
  rng = np.random.default_rng(seed)
  mask = np.arange(11)[None] < np.array(LENGTHS)[:, None]
  ids = rng.integers(2, vocab, mask.shape) * mask
  rows = {'inputs': ids, 'inputs_mask': mask, 'inputs_tasks': mask * 1}
  return jax.device_put(rows)


def make(config, method='full', noise=0.0, **options):
  """(model, variables); `noise` moves adapters off where they start."""
  built = build(method, sites(config))
  model = Decoder(config, built.adapter_map, **options)
  return model, _variables(config, method, noise, model.param_dtype)


@functools.cache
def _variables(config, method, noise, dtype):
  """Weights so large that all of them matter; biases and scales too."""
  advice = build(method, sites(config)).adapter_map
  model = Decoder(config, advice, param_dtype=dtype)
  params = small.moved(
    init_params(model, _rows_to_train(), 3)['params'], 0.2, 1
  )
  # After it: some adapters start from the base's weights.
  peft = init_params(model, _rows_to_train(), 3, params)['peft']
  return {'params': params, 'peft': small.moved(peft, noise, 2)}


def _rows_to_train():
  """`batch` with what is trained, which routers of prompts read."""
  return batch() | {'targets_mask': batch()['inputs_mask']}


def place(positions, length):
  """The context of cached decoding at positions [b, t]."""
  return Context(
    token_mask=jnp.ones(positions.shape, bool),
    positions=positions,
    decode=True,
    cache_length=length,
  )
