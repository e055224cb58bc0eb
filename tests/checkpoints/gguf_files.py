# SPDX-License-Identifier: Apache-2.0
"""Small GGUF files, written by the package `gguf` as llama.cpp's converter
would."""

import dataclasses
import functools

import numpy as np

from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.decoder.gemma import SIZES as GEMMA
from moepeft.models.decoder.gpt2 import SIZES as GPT2
from moepeft.models.decoder.llama import SIZES as LLAMA
from moepeft.models.decoder.qwen2 import SIZES as QWEN2
from moepeft.models.decoder.qwen3 import SIZES as QWEN3

# Blocks of quantised numbers are of 32, so sizes are multiples of it.
_SMALL = dict(
  vocab=61, d_model=64, heads=4, kv_heads=2, head_dim=32, ffn=96, layers=2
)
_ALL = _SMALL | dict(heads=2, kv_heads=2, ffn=256)


CONFIGS = {
  'llama': dataclasses.replace(LLAMA['smollm2-135m'], **_SMALL, tied=False),
  'qwen2': dataclasses.replace(QWEN2['2.5-0.5b'], **_SMALL),
  'qwen3': dataclasses.replace(QWEN3['0.6b'], **_SMALL),
  # Gemma's scale is that of its own head size, which no file says.
  'gemma': dataclasses.replace(
    GEMMA['2b'], **_SMALL | dict(head_dim=256, kv_heads=1)
  ),
  'gemma2': dataclasses.replace(
    GEMMA['2-2b'],
    **_SMALL | dict(head_dim=256),
    window=5,
    windowed=(True, False),
    # 256 ** -0.5
    scale=0.0625,
  ),
  'gpt2': dataclasses.replace(GPT2['small'], **_ALL),
}


def random_params(config, seed=0):
  """Weights so large that all of them matter."""
  rng = np.random.default_rng(seed)
  family = FAMILIES[config.family]
  expected = weight_mapping.entries(
    family.gguf.rules(config),
    family.axis_sizes(config),
    family.depths(config),
  )
  return weight_mapping.unflatten(
    {
      path: (0.15 * rng.normal(size=shape)).astype(np.float32)
      for path, shape in weight_mapping.stacked_shapes(expected).items()
    }
  )


def write(path, arch, params, kind='F32', config=None, tensors=(), more=None):
  """Writes a model.

  Args:
    kind: of matrices, a name of `gguf.GGMLQuantizationType`; the matrices are
      other ones where the package reads it only.
    tensors: (name, array) to write too; more: changes the writer.

  Returns:
    {their name: what a reader should find, in Hugging Face's order}.
  """
  import gguf

  config = config or CONFIGS[arch]
  kind = gguf.GGMLQuantizationType[kind]
  writer = gguf.GGUFWriter(path, arch)
  _describe(writer, arch, config)
  if more:
    more(writer)
  family = FAMILIES[config.family]
  sizes = family.axis_sizes(config)
  expected = weight_mapping.entries(
    family.gguf.rules(config), sizes, family.depths(config)
  )
  actual = {}
  for entry, array in weight_mapping.write(expected, sizes, params):
    name = entry.stored_name
    stored = as_converted(name, array, arch, config)
    if stored.ndim == 2 and stored.shape[0] > 1:
      stored = quantised(stored, kind)
      actual[name] = gguf.dequantize(stored, kind)
      writer.add_tensor(name, stored, raw_dtype=kind)
    else:
      actual[name] = stored
      writer.add_tensor(name, stored)
  for name, array in tensors:
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return actual


def quantised(array, kind):
  """The blocks of a matrix; random ones where nobody here makes them."""
  import gguf

  try:
    return gguf.quantize(array, kind)
  except NotImplementedError:
    size, _ = gguf.GGML_QUANT_SIZES[kind]
    blocks = _random_blocks(kind)
    rng = np.random.default_rng(array.shape[0])
    chosen = rng.integers(len(blocks), size=array.size // size)
    return blocks[chosen].reshape(array.shape[0], -1)


@functools.cache
def _random_blocks(kind):
  """Blocks of a kind, of finite numbers of a weight's size."""
  import gguf

  _, width = gguf.GGML_QUANT_SIZES[kind]
  blocks = np.random.default_rng(0).integers(
    256, size=(1024, width), dtype=np.uint8
  )
  # Some bytes are a block's scale, which may come out as inf or NaN.
  with np.errstate(all='ignore'):
    numbers = gguf.dequantize(blocks, kind)
  return blocks[(np.abs(numbers) < 1e4).all(axis=1)]


def as_converted(name, array, arch, config):
  """A tensor of Hugging Face as llama.cpp's converter writes it.

  Llama's heads of q and k: features (0, 1, .., h/2 - 1 | h/2, ..) become
  (0, h/2, 1, h/2 + 1, ..). Gemma's norms get 1 added.
  """
  if arch == 'llama' and ('attn_q.' in name or 'attn_k.' in name):
    h = config.head_dim
    turned = np.arange(h).reshape(2, h // 2).T.ravel()
    rows = np.arange(len(array)).reshape(-1, h)[:, turned].ravel()
    return array[rows]
  if 'gemma' in arch and name.endswith('norm.weight'):
    return array + 1
  return array


def _describe(writer, arch, c):
  writer.add_context_length(c.length)
  writer.add_embedding_length(c.d_model)
  writer.add_block_count(c.layers)
  writer.add_feed_forward_length(c.ffn)
  writer.add_head_count(c.heads)
  writer.add_vocab_size(c.vocab)
  if arch == 'gpt2':
    writer.add_layer_norm_eps(c.eps)
    return
  writer.add_head_count_kv(c.kv_heads)
  writer.add_key_length(c.head_dim)
  writer.add_value_length(c.head_dim)
  writer.add_rope_dimension_count(c.head_dim)
  writer.add_rope_freq_base(c.rope.theta)
  writer.add_layer_norm_rms_eps(c.eps)
  if arch == 'gemma2':
    writer.add_sliding_window(c.window)
    writer.add_attn_logit_softcapping(c.attention_cap)
    writer.add_final_logit_softcapping(c.logits_cap)
