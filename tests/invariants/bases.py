# SPDX-License-Identifier: Apache-2.0
"""Tiny base models in Hugging Face's format, written with numpy alone.

Nothing of moepeft takes part, so that no change of it can move the weights from
which recorded losses start.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from tests import chat_cases

VOCAB, D_MODEL, HEAD_DIM, FFN = 293, 12, 6, 22
T5 = {
  'model_type': 't5',
  'architectures': ['T5ForConditionalGeneration'],
  'vocab_size': VOCAB,
  'd_model': D_MODEL,
  'd_kv': HEAD_DIM,
  'd_ff': FFN,
  'num_layers': 2,
  'num_decoder_layers': 2,
  'num_heads': 2,
  'relative_attention_num_buckets': 32,
  'relative_attention_max_distance': 128,
  'layer_norm_epsilon': 1e-6,
  'feed_forward_proj': 'gated-gelu',
  'tie_word_embeddings': False,
  'pad_token_id': 0,
  'eos_token_id': 1,
  'decoder_start_token_id': 0,
}
LLAMA = {
  'model_type': 'llama',
  'architectures': ['LlamaForCausalLM'],
  'vocab_size': VOCAB,
  'hidden_size': D_MODEL,
  'intermediate_size': FFN,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'head_dim': HEAD_DIM,
  'rms_norm_eps': 1e-5,
  'rope_theta': 10000.0,
  'max_position_embeddings': 512,
  'hidden_act': 'silu',
  'tie_word_embeddings': True,
  'bos_token_id': 1,
  'eos_token_id': 2,
}


def _t5_shapes() -> dict[str, tuple[int, ...]]:
  inner = T5['num_heads'] * HEAD_DIM
  shapes = {
    'shared.weight': (VOCAB, D_MODEL),
    'lm_head.weight': (VOCAB, D_MODEL),
  }

  def attention(name, bias):
    for projection in 'qkv':
      shapes[f'{name}.{projection}.weight'] = (inner, D_MODEL)
    shapes[f'{name}.o.weight'] = (D_MODEL, inner)
    if bias:
      shapes[f'{name}.relative_attention_bias.weight'] = (32, T5['num_heads'])

  for side, kinds in (
    ('encoder', ('SelfAttention', 'DenseReluDense')),
    ('decoder', ('SelfAttention', 'EncDecAttention', 'DenseReluDense')),
  ):
    shapes[f'{side}.final_layer_norm.weight'] = (D_MODEL,)
    for i in range(2):
      for j, kind in enumerate(kinds):
        layer = f'{side}.block.{i}.layer.{j}'
        shapes[f'{layer}.layer_norm.weight'] = (D_MODEL,)
        if kind == 'DenseReluDense':
          shapes[f'{layer}.{kind}.wi_0.weight'] = (FFN, D_MODEL)
          shapes[f'{layer}.{kind}.wi_1.weight'] = (FFN, D_MODEL)
          shapes[f'{layer}.{kind}.wo.weight'] = (D_MODEL, FFN)
        else:
          attention(f'{layer}.{kind}', i == 0 and kind == 'SelfAttention')
  return shapes


def _llama_shapes() -> dict[str, tuple[int, ...]]:
  q = LLAMA['num_attention_heads'] * HEAD_DIM
  shapes = {
    'model.embed_tokens.weight': (VOCAB, D_MODEL),
    'model.norm.weight': (D_MODEL,),
  }
  for i in range(LLAMA['num_hidden_layers']):
    layer = f'model.layers.{i}'
    shapes |= {
      f'{layer}.input_layernorm.weight': (D_MODEL,),
      f'{layer}.post_attention_layernorm.weight': (D_MODEL,),
      f'{layer}.self_attn.q_proj.weight': (q, D_MODEL),
      f'{layer}.self_attn.k_proj.weight': (HEAD_DIM, D_MODEL),
      f'{layer}.self_attn.v_proj.weight': (HEAD_DIM, D_MODEL),
      f'{layer}.self_attn.o_proj.weight': (D_MODEL, q),
      f'{layer}.mlp.gate_proj.weight': (FFN, D_MODEL),
      f'{layer}.mlp.up_proj.weight': (FFN, D_MODEL),
      f'{layer}.mlp.down_proj.weight': (D_MODEL, FFN),
    }
  return shapes


def write(folder: pathlib.Path) -> dict[str, str]:
  """Writes both models; returns {family: directory}."""
  for name, config, shapes in (
    ('t5', T5, _t5_shapes()),
    ('llama', LLAMA, _llama_shapes()),
  ):
    rng = np.random.default_rng(0)
    weights = {}
    for key in sorted(shapes):
      shape = shapes[key]
      values = rng.standard_normal(shape)
      # Norms are near one; a product's output is of its input's size.
      scaled = (
        1 + 0.1 * values if len(shape) == 1 else values * shape[1] ** -0.5
      )
      weights[key] = scaled.astype(np.float32)
    (folder / name).mkdir()
    (folder / name / 'config.json').write_text(json.dumps(config))
    save_file(weights, folder / name / 'model.safetensors', {'format': 'pt'})
  chat_cases.tokenizer().save_pretrained(folder / 'llama')
  return {name: str(folder / name) for name in ('t5', 'llama')}
