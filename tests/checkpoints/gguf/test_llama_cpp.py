# SPDX-License-Identifier: Apache-2.0
"""Directories satisfy llama.cpp's convert_hf_to_gguf, which Ollama runs too.

The test has that script's checks as of August 2026.
"""

import dataclasses
import json
from pathlib import Path

import gguf
import pytest

from moepeft import convert
from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.gguf import model as gguf_lib
from moepeft.checkpoints.hf import model as hf
from moepeft.models import weight_mapping
from moepeft.nn.rope import Rope

from ..cases import DECODERS, GPT2, adapter_tree, random_params
from ..gguf_files import CONFIGS, write
from ..gguf_files import random_params as gguf_params

MISTRAL = dataclasses.replace(
  DECODERS['llama'],
  family='mistral',
  attention_bias=False,
  out_bias=False,
  mlp_bias=False,
)
GEMMA = dataclasses.replace(
  DECODERS['gemma2'],
  post_norms=False,
  window=0,
  windowed=(),
  attention_cap=0.0,
  logits_cap=0.0,
)
FAMILIES = DECODERS | {'mistral': MISTRAL, 'gemma': GEMMA, 'gpt2': GPT2}
# Under which name the script knows each, and what it makes of it.
KNOWN = {
  'llama': ('LlamaForCausalLM', 'LLAMA'),
  'mistral': ('MistralForCausalLM', 'LLAMA'),
  'qwen2': ('Qwen2ForCausalLM', 'QWEN2'),
  'qwen3': ('Qwen3ForCausalLM', 'QWEN3'),
  'gemma': ('GemmaForCausalLM', 'GEMMA'),
  'gemma2': ('Gemma2ForCausalLM', 'GEMMA2'),
  'gpt2': ('GPT2LMHeadModel', 'GPT2'),
}
# The fields that it reads, by whichever of its names ours has.
ASKED = {
  'vocab_size',
  'num_hidden_layers',
  'hidden_size',
  'intermediate_size',
  'num_attention_heads',
  'num_key_value_heads',
  'head_dim',
  'max_position_embeddings',
  'rms_norm_eps',
  'rope_parameters',
  'rope_theta',
}
ASKED_OF = {
  'gemma2': {
    'sliding_window',
    'attn_logit_softcapping',
    'final_logit_softcapping',
  },
}
# All that it reads of GPT-2, whose feed-forward it takes to be 4 n_embd.
ASKED_OF_GPT2 = {
  'vocab_size',
  'n_layer',
  'n_embd',
  'n_head',
  'n_ctx',
  'layer_norm_epsilon',
}
# A tokenizer's, and what ends an answer.
FILES = {
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'tokenizer.model',
  'vocab.json',
  'merges.txt',
  'added_tokens.json',
  'chat_template.jinja',
  'generation_config.json',
}
AT = ['decoder/self/o', 'decoder/mlp/wo']
METHOD = f"lora(rank=7, alpha=3, targets='{'|'.join(AT)}')"


@pytest.fixture(params=FAMILIES)
def merged(request, tmp_path, monkeypatch):
  """(family, config, config.json) of what is merged into 'out'."""
  monkeypatch.chdir(tmp_path)
  config = FAMILIES[request.param]
  params = random_params(config)
  hf.save('base', config, params)
  for name in FILES:
    Path('base', name).write_text('{}')
  leaves = {'lora/a': '{in}r', 'lora/b': 'r{out}'}
  tree, sha256 = (
    adapter_tree(config, leaves, AT),
    weight_mapping.content_hash(params),
  )
  card = adapter_lib.describe(
    METHOD, 'official', 'base', sha256, config.family, config
  )
  adapter_lib.save(
    'adapter', AdapterWeights(METHOD, tree).tree, json.loads(json.dumps(card))
  )
  arguments = ['--input=adapter', '--output=out', '--to=hf', '--dtype=float16']
  assert convert.main(['convert', *arguments]) == 0
  fields = json.loads(Path('out/config.json').read_text())
  return request.param, config, fields


def test_a_merged_directory_says_what_the_script_asks(merged):
  family, _, fields = merged
  assert fields['architectures'] == [KNOWN[family][0]]
  asked = ASKED | ASKED_OF.get(family, set())
  asked = ASKED_OF_GPT2 if family == 'gpt2' else asked
  assert asked <= fields.keys()
  assert fields['dtype'] == 'float16'
  actual = {path.name for path in Path('out').iterdir()}
  assert actual == FILES | {'config.json', 'model.safetensors'}


def test_the_script_has_a_name_for_every_tensor(merged):
  family, config, _ = merged
  arch = gguf.MODEL_ARCH[KNOWN[family][1]]
  known = gguf.get_tensor_name_map(arch, config.layers)
  stored = hf.open_tensors(Path('out')).shapes
  reference = {
    name: known.get_name(name, try_suffixes=('.weight', '.bias'))
    for name in stored
  }
  assert [name for name, new in reference.items() if new is None] == []
  assert len({*reference.values()}) == len(stored)
  # The head is not written twice where it is the embedding.
  assert ('output.weight' in reference.values()) == (not config.tied)


@pytest.mark.parametrize(
  'rope, said',
  [
    (Rope(500.0, 'linear', 3.0), {'factor'}),
    (
      Rope(500.0, 'llama3', 8.0, 32),
      {
        'factor',
        'low_freq_factor',
        'high_freq_factor',
        'original_max_position_embeddings',
      },
    ),
    (
      Rope(500.0, 'yarn', 4.0, 32),
      {
        'factor',
        'beta_fast',
        'beta_slow',
        'original_max_position_embeddings',
      },
    ),
  ],
  ids=lambda value: getattr(value, 'kind', ''),
)
def test_scalings_are_said_as_new_and_as_old_scripts_read_them(
  rope, said, tmp_path
):
  config = dataclasses.replace(MISTRAL, family='llama', rope=rope)
  hf.save(tmp_path / 'out', config, random_params(config))
  fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
  new, old = fields['rope_parameters'], fields['rope_scaling']
  assert said | {'rope_type', 'rope_theta'} == new.keys()
  assert new['rope_type'] == rope.kind and new['rope_theta'] == 500.0
  assert old == {k: v for k, v in new.items() if k != 'rope_theta'}
  assert fields['rope_theta'] == 500.0


def test_the_factor_of_yarns_queries_comes_back(tmp_path):
  path = str(tmp_path / 'model.gguf')

  def more(writer):
    # As the script writes attention_factor, beta_fast and beta_slow.
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(2048)
    writer.add_float32('llama.rope.scaling.yarn_attn_factor', 1.3)
    writer.add_float32('llama.rope.scaling.yarn_beta_fast', 16.0)
    writer.add_float32('llama.rope.scaling.yarn_beta_slow', 2.0)

  write(path, 'llama', gguf_params(CONFIGS['llama']), more=more)
  assert gguf_lib.load_config(path).rope == Rope(
    100000.0, 'yarn', 4.0, 2048, fast=16.0, slow=2.0, attention=1.3
  )
