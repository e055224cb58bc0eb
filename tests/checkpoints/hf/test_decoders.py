# SPDX-License-Identifier: Apache-2.0
"""Every family of decoders against `transformers`, in both directions.

Random models of odd sizes, heads x head size unlike the width.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.decoder.model import Decoder
from moepeft.models.weight_mapping import CheckpointError

from ..cases import assert_equal_trees, config_from_hf

# 2 * 3 heads of 10 beside a width of 42; 23 tokens, longer than the windows
# and than the contexts before scaling.
COMMON = dict(
  vocab_size=61,
  hidden_size=42,
  num_attention_heads=6,
  num_key_value_heads=2,
  head_dim=10,
  intermediate_size=53,
  num_hidden_layers=3,
  max_position_embeddings=64,
)
LLAMA3 = dict(
  rope_type='llama3',
  rope_theta=700.0,
  factor=5.0,
  low_freq_factor=1.0,
  high_freq_factor=3.0,
  original_max_position_embeddings=13,
)
YARN = dict(
  rope_type='yarn',
  rope_theta=900.0,
  factor=4.0,
  original_max_position_embeddings=16,
)
CASES = {
  'llama': ('Llama', dict(num_key_value_heads=1, attention_bias=True)),
  'llama-llama3': (
    'Llama',
    dict(rope_parameters=LLAMA3, mlp_bias=True, tie_word_embeddings=True),
  ),
  'llama-linear': (
    'Llama',
    dict(
      rope_parameters=dict(rope_type='linear', rope_theta=500.0, factor=3.0),
      num_key_value_heads=6,
    ),
  ),
  'llama-yarn': ('Llama', dict(rope_parameters=YARN)),
  'llama-yarn-all': (
    'Llama',
    dict(
      rope_parameters=YARN
      | dict(beta_fast=5.0, beta_slow=0.5, attention_factor=1.3, truncate=False)
    ),
  ),
  'llama-yarn-mscale': (
    'Llama',
    dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.4)),
  ),
  'llama-yarn-short': (
    'Llama',
    dict(rope_parameters=YARN | dict(original_max_position_embeddings=1)),
  ),
  # Without both it is as if neither was there.
  'llama-yarn-one-mscale': (
    'Llama',
    dict(rope_parameters=YARN | dict(mscale=0.7)),
  ),
  # The context before is then what the model is for.
  'llama-yarn-unsaid': (
    'Llama',
    dict(rope_parameters=dict(rope_type='yarn', rope_theta=900.0, factor=4.0)),
  ),
  # This one counts where both say it.
  'llama-yarn-outer': (
    'Llama',
    dict(rope_parameters=YARN, original_max_position_embeddings=29),
  ),
  # Nought is as if it was not there.
  'llama-yarn-nought': (
    'Llama',
    dict(rope_parameters=YARN | dict(beta_fast=0, beta_slow=None)),
  ),
  'llama-whole-heads': (
    'Llama',
    dict(
      rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=1.0),
      attention_bias=True,
      mlp_bias=True,
    ),
  ),
  'mistral': ('Mistral', dict(sliding_window=5)),
  'mistral-llama3': ('Mistral', dict(rope_parameters=LLAMA3)),
  'mistral-whole': ('Mistral', dict(sliding_window=None)),
  'qwen2': (
    'Qwen2',
    dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
  ),
  # A window that is said and not used.
  'qwen2-unused-window': (
    'Qwen2',
    dict(use_sliding_window=False, sliding_window=3, max_window_layers=0),
  ),
  # Each layer's own type counts, not their depth.
  'qwen2-layer-types': (
    'Qwen2',
    dict(
      use_sliding_window=True,
      sliding_window=3,
      max_window_layers=0,
      layer_types=['sliding_attention', 'full_attention', 'full_attention'],
    ),
  ),
  'qwen2-yarn': (
    'Qwen2',
    dict(rope_parameters=YARN, tie_word_embeddings=True),
  ),
  'qwen3': (
    'Qwen3',
    dict(
      use_sliding_window=True,
      sliding_window=3,
      layer_types=['full_attention', 'sliding_attention', 'full_attention'],
      attention_bias=True,
    ),
  ),
  'qwen3-by-depth': (
    'Qwen3',
    dict(use_sliding_window=True, sliding_window=3, max_window_layers=2),
  ),
  'qwen3-linear': (
    'Qwen3',
    dict(
      rope_parameters=dict(rope_type='linear', rope_theta=500.0, factor=3.0),
      tie_word_embeddings=True,
    ),
  ),
  'gemma-untied': ('Gemma', dict(tie_word_embeddings=False)),
  'gemma2-uncapped': (
    'Gemma2',
    dict(
      sliding_window=4,
      layer_types=['full_attention', 'full_attention', 'sliding_attention'],
      query_pre_attn_scalar=10,
      attn_logit_softcapping=None,
      final_logit_softcapping=None,
      rope_parameters=YARN,
      attention_bias=True,
    ),
  ),
  'gemma': ('Gemma', dict(hidden_act='gelu', num_key_value_heads=1)),
  'gemma2': (
    'Gemma2',
    dict(
      sliding_window=4,
      query_pre_attn_scalar=7,
      attn_logit_softcapping=2.0,
      final_logit_softcapping=3.0,
    ),
  ),
  'gpt2': ('GPT2', dict(n_inner=53, tie_word_embeddings=False)),
  'gpt2-relu': ('GPT2', dict(activation_function='relu', n_inner=None)),
  'gpt2-unscaled': ('GPT2', dict(scale_attn_weights=False)),
}
LENGTHS = (23, 11)


def torch_model(name):
  """A random model of `transformers`, its weights so large that all matter."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  kind, options = CASES[name]
  if kind == 'GPT2':
    sizes = dict(vocab_size=61, n_embd=42, n_head=6, n_layer=3, n_positions=31)
  else:
    sizes = COMMON
  config = getattr(transformers, f'{kind}Config')(**sizes | options)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  noise = torch.Generator().manual_seed(len(name))
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.15 * torch.randn(weight.shape, generator=noise))
  return model


def batch():
  """Ids int [2, 23], the second row shorter, and which of them are real."""
  ids = np.random.default_rng(0).integers(2, 61, (2, 23))
  return ids, np.arange(23) < np.array(LENGTHS)[:, None]


def torch_logits(model):
  import torch

  ids, real = batch()
  with torch.no_grad():
    actual = model(
      input_ids=torch.tensor(ids), attention_mask=torch.tensor(real).long()
    )
  return actual.logits.numpy()[real]


@pytest.mark.parametrize('name', CASES)
def test_models_of_transformers_come_in_and_go_out(name, tmp_path):
  import transformers

  reference = torch_model(name)
  reference.save_pretrained(tmp_path / 'theirs')
  expected = torch_logits(reference)
  loaded = hf.load(str(tmp_path / 'theirs'))
  ids, real = batch()
  run = jax.jit(Decoder(loaded.config).apply)
  actual = run({'params': loaded.params}, {'inputs': ids, 'inputs_mask': real})
  # Sums of 50 products through 3 layers; wrong frequencies give 1e-2.
  error = np.abs(np.asarray(actual)[real] - expected).max()
  assert error < 2e-5 * np.abs(expected).max()

  hf.save(str(tmp_path / 'ours'), loaded.config, loaded.params)
  assert hf.load(str(tmp_path / 'ours')).config == loaded.config
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
  # The same arrays, at other places in memory: sums in another order.
  np.testing.assert_allclose(torch_logits(back.eval()), expected, atol=1e-5)
  assert back.config.eos_token_id is None


@pytest.mark.parametrize('name', CASES)
def test_what_transformers_4_wrote_means_the_same(name, tmp_path):
  torch_model(name).config.save_pretrained(tmp_path)
  fields = json.loads((tmp_path / 'config.json').read_text())
  if name in ('qwen2-layer-types', 'qwen3', 'gemma2-uncapped'):
    # 4 knew no order but the one that depth gives.
    del fields['layer_types']
  new = config_from_hf(fields, tied=False)
  rope = fields.pop('rope_parameters', {})
  fields['rope_theta'] = rope.pop('rope_theta', 10000.0)
  if rope.get('rope_type', 'default') != 'default':
    fields['rope_scaling'] = {'type': rope.pop('rope_type'), **rope}
  fields.pop('layer_types', None)
  assert config_from_hf(fields, tied=False) == new


KINDS = ('Llama', 'Mistral', 'Qwen2', 'Qwen3', 'Gemma', 'Gemma2', 'GPT2')


@pytest.mark.parametrize('kind', KINDS)
def test_where_a_file_is_silent_it_means_what_transformers_takes(
  kind, tmp_path, monkeypatch
):
  """Only sizes are said: theta, eps, windows, caps and whether the head is
  the embedding are the family's usual ones."""
  monkeypatch.setitem(CASES, 'silent', (kind, {}))
  reference = torch_model('silent')
  reference.save_pretrained(tmp_path)
  file = tmp_path / 'config.json'
  fields = json.loads(file.read_text())
  said = {'n_embd', 'n_head', 'n_layer', 'n_positions', *COMMON}
  said |= {'model_type'}
  file.write_text(json.dumps({k: fields[k] for k in said & fields.keys()}))
  expected = torch_logits(reference)
  loaded = hf.load(str(tmp_path))
  assert loaded.config.tied == (kind in ('Gemma', 'Gemma2', 'GPT2'))
  ids, real = batch()
  run = jax.jit(Decoder(loaded.config).apply)
  actual = run({'params': loaded.params}, {'inputs': ids, 'inputs_mask': real})
  error = np.abs(np.asarray(actual)[real] - expected).max()
  assert error < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2', 'qwen3'])
def test_a_head_that_is_lost_where_the_file_is_silent_is_missed(
  family, tmp_path
):
  """These have one of their own unless they say otherwise: transformers
  would draw it at random."""
  from safetensors.numpy import load_file, save_file

  config, params = small(family)
  hf.save(tmp_path / 'model', config, params)
  file = tmp_path / 'model' / 'model.safetensors'
  stored = load_file(file)
  del stored['lm_head.weight']
  save_file(stored, file)
  file = tmp_path / 'model' / 'config.json'
  fields = json.loads(file.read_text())
  del fields['tie_word_embeddings']
  file.write_text(json.dumps(fields))
  with pytest.raises(CheckpointError, match='hold no head'):
    hf.load(str(tmp_path / 'model'))
  file.write_text(json.dumps(fields | {'tie_word_embeddings': True}))
  assert hf.load(str(tmp_path / 'model')).config.tied


def small(family):
  """A model of a family: its config and random weights."""
  if family == 'gpt2':
    sizes = dict(vocab_size=61, n_embd=42, n_head=6, n_layer=3)
    config = config_from_hf({**sizes, 'model_type': 'gpt2'}, True)
  else:
    config = config_from_hf({**COMMON, 'model_type': family}, False)
  rng = np.random.default_rng(0)
  shapes = weight_mapping.stacked_shapes(hf.model_entries(config))
  return config, weight_mapping.unflatten(
    {
      path: rng.normal(size=shape).astype(np.float32)
      for path, shape in shapes.items()
    }
  )


def test_parts_of_one_array_are_told_apart(tmp_path):
  from safetensors.numpy import load_file

  config, params = small('gpt2')
  hf.save(tmp_path / 'model', config, params)
  stored = load_file(tmp_path / 'model' / 'model.safetensors')
  joined = stored['transformer.h.1.attn.c_attn.weight']
  assert joined.shape == (42, 3 * 42)
  # Head 2, feature 3 of the keys: after 42 queries and 2 heads of 7.
  k = params['decoder']['layers']['self']['k']['kernel']
  np.testing.assert_array_equal(joined[:, 42 + 2 * 7 + 3], k[1, :, 2, 3])
  bias = stored['transformer.h.2.attn.c_attn.bias']
  v = params['decoder']['layers']['self']['v']['bias']
  np.testing.assert_array_equal(bias[84:], v[2].ravel())
  loaded = hf.load(str(tmp_path / 'model'))
  assert_equal_trees(loaded.params, params)
  assert loaded.sha256 == weight_mapping.content_hash(params)


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
def test_constants_and_an_absent_prefix_change_nothing(family, tmp_path):
  from safetensors.numpy import load_file, save_file

  config, params = small(family)
  hf.save(tmp_path / 'model', config, params)
  file = tmp_path / 'model' / 'model.safetensors'
  prefix = {'llama': 'model.', 'gpt2': 'transformer.'}[family]
  stored = load_file(file)
  stored = {name.removeprefix(prefix): a for name, a in stored.items()}
  mask = np.ones((1, 1, 5, 5), bool)
  stored |= {
    'llama': {'layers.0.self_attn.rotary_emb.inv_freq': np.ones(5)},
    'gpt2': {'h.0.attn.bias': mask, 'h.0.attn.masked_bias': mask},
  }[family]
  save_file(stored, file)
  assert_equal_trees(hf.load(str(tmp_path / 'model')).params, params)


def test_files_stay_small_where_arrays_are_joined(tmp_path):
  config, params = small('gpt2')
  hf.save(tmp_path / 'model', config, params, max_shard_bytes=30_000)
  assert len(list((tmp_path / 'model').glob('*.safetensors'))) > 3
  assert_equal_trees(hf.load(str(tmp_path / 'model')).params, params)


@pytest.mark.parametrize(
  'change, sentence',
  [
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "is 'dynamic'"),
    ({'rope_parameters': {'rope_type': 'longrope'}}, "is 'longrope'"),
    ({'rope_scaling': {'type': 'linear'}}, 'its factor is missing'),
    (
      {'rope_scaling': {'rope_type': 'su', 'short_factor': [1.0]}},
      "is 'su'",
    ),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary'),
    ({'rope_parameters': {'full_attention': {}}}, 'each type of layer'),
    ({'quantization_config': {'bits': 4}}, 'quantized weights'),
    ({'model_type': 'mamba'}, "family 'mamba'"),
    ({'hidden_act': 'swish2'}, "activation 'swish2'"),
    ({'tie_word_embeddings': False, 'headless': True}, 'hold no head'),
  ],
)
def test_what_is_not_supported_is_one_sentence(change, sentence, tmp_path):
  from safetensors.numpy import load_file, save_file

  config, params = small('llama')
  folder = tmp_path / 'model'
  hf.save(folder, config, params)
  if change.pop('headless', False):
    stored = load_file(folder / 'model.safetensors')
    del stored['lm_head.weight']
    save_file(stored, folder / 'model.safetensors')
  fields = json.loads((folder / 'config.json').read_text())
  if 'rope_parameters' in change:
    fields.pop('rope_scaling', None)
  (folder / 'config.json').write_text(json.dumps(fields | change))
  with pytest.raises(CheckpointError, match=sentence) as error:
    hf.load(str(folder))
  assert '\n' not in str(error.value)


def test_special_ids_come_along_with_the_tokenizer(tmp_path):
  config, params = small('llama')
  source = tmp_path / 'source'
  source.mkdir()
  (source / 'config.json').write_text('{"eos_token_id": [7, 9]}')
  (source / 'generation_config.json').write_text('{"eos_token_id": 7}')
  hf.save(tmp_path / 'model', config, params, tokenizer=str(source))
  fields = json.loads((tmp_path / 'model' / 'config.json').read_text())
  assert fields['eos_token_id'] == [7, 9] and fields['bos_token_id'] is None
  assert (tmp_path / 'model' / 'generation_config.json').exists()


@pytest.mark.parametrize(
  'family, changes, lost',
  [
    ('llama', dict(positions='alibi'), 'positions'),
    ('llama', dict(window=5), 'windowed, window'),
    ('llama', dict(scale=0.3, qk_norm=True), 'qk_norm, scale'),
    ('gpt2', dict(head_dim=8), 'head_dim'),
  ],
)
def test_what_hugging_face_can_not_say_is_not_written(family, changes, lost):
  config = dataclasses.replace(small(family)[0], **changes)
  with pytest.raises(CheckpointError, match='does not support') as error:
    FAMILIES[config.family].hf.to_fields(config)
  for name in lost.split(', '):
    assert name in str(error.value)
