# SPDX-License-Identifier: Apache-2.0
"""BERT against `transformers`, in both directions.

Random models of odd sizes: states, pooled rows and logits of masked tokens.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.models import weight_mapping
from moepeft.models.bert import weights as bert_weights
from moepeft.models.bert.model import Bert, sites
from moepeft.models.weight_mapping import CheckpointError
from moepeft.peft import build

from ..cases import adapter_tree, assert_equal_trees, random_params

# Heads of 7; 23 tokens of 29 positions.
SIZES = dict(
  vocab_size=61,
  hidden_size=21,
  num_attention_heads=3,
  intermediate_size=53,
  num_hidden_layers=3,
  max_position_embeddings=29,
  type_vocab_size=5,
)
CASES = {
  'model': ('Model', {}),
  'without-pooler': ('Model', dict(hidden_act='gelu_new')),
  'masked': ('ForMaskedLM', {}),
  'masked-untied': ('ForMaskedLM', dict(tie_word_embeddings=False)),
  'pretraining': ('ForPreTraining', dict(hidden_act='relu')),
}
CONFIG = dataclasses.replace(
  bert_weights.from_hf_fields(SIZES, True), pooler=True, masked=True
)


def torch_model(name):
  """A random model of `transformers`, its weights so large that all matter."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  kind, options = CASES[name]
  config = transformers.BertConfig(**SIZES | options)
  more = {'add_pooling_layer': False} if name == 'without-pooler' else {}
  model = getattr(transformers, f'Bert{kind}')(config, **more).eval()
  noise = torch.Generator().manual_seed(len(name))
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.15 * torch.randn(weight.shape, generator=noise))
  return model


def batch():
  """Ids and types int [2, 23], the second row shorter; which are real."""
  rng = np.random.default_rng(0)
  ids, types = rng.integers(2, 61, (2, 23)), rng.integers(0, 5, (2, 23))
  return ids, types, np.arange(23) < np.array([[23], [11]])


def torch_said(model):
  """States and logits of real tokens, and pooled rows, where it has them."""
  import torch

  ids, types, real = batch()
  with torch.no_grad():
    actual = model(
      input_ids=torch.tensor(ids),
      token_type_ids=torch.tensor(types),
      attention_mask=torch.tensor(real).long(),
      output_hidden_states=True,
    )
  said = {'states': actual.hidden_states[-1].numpy()[real]}
  for name in ('logits', 'prediction_logits'):
    if actual.get(name) is not None:
      said['logits'] = actual[name].numpy()[real]
  if actual.get('pooler_output') is not None:
    said['pooled'] = actual.pooler_output.numpy()
  return said


def our_said(config, params, dtype='float32', adapter_map=None):
  ids, types, real = batch()
  model = Bert(config, dtype=dtype)
  if adapter_map is not None:
    model = Bert(config, adapter_map, dtype=dtype)
  actual = jax.jit(model.apply)(
    params, {'inputs': ids, 'inputs_types': types, 'inputs_mask': real}
  )
  said = {'states': np.asarray(actual.states)[real], 'pooled': actual.pooled}
  if actual.logits is not None:
    said['logits'] = np.asarray(actual.logits)[real]
  return {k: np.asarray(v) for k, v in said.items() if v is not None}


def assert_near(ours, theirs, limit):
  """Largest difference, by the largest value."""
  for name, expected in theirs.items():
    error = np.abs(ours[name] - expected).max() / np.abs(expected).max()
    assert error < limit, (name, error)


@pytest.mark.parametrize('name', CASES)
def test_models_of_transformers_come_in_and_go_out(name, tmp_path):
  reference = torch_model(name)
  reference.save_pretrained(tmp_path / 'theirs')
  loaded = hf.load(str(tmp_path / 'theirs'))
  config = loaded.config
  masked = name in ('masked', 'masked-untied', 'pretraining')
  pooler = name in ('model', 'pretraining')
  assert (config.masked, config.pooler) == (masked, pooler)
  assert config.tied == (name != 'masked-untied')
  expected = torch_said(reference)
  # Sums of 50 products through 3 layers; the tanh of the other GELU gives 1e-3.
  assert_near(our_said(config, {'params': loaded.params}), expected, 1e-5)

  hf.save(str(tmp_path / 'ours'), config, loaded.params)
  again = hf.load(str(tmp_path / 'ours'))
  assert again.config == config and again.sha256 == loaded.sha256
  assert_equal_trees(again.params, loaded.params)
  if name != 'pretraining':
    back = type(reference).from_pretrained(tmp_path / 'ours').eval()
    assert_near(torch_said(back), expected, 1e-5)


def test_in_float64_nothing_is_left_between_them(tmp_path):
  """No operation is another: only the order of sums."""
  reference = torch_model('model')
  reference.save_pretrained(tmp_path)
  expected = torch_said(reference.double())
  with jax.enable_x64(True):
    loaded = hf.load(str(tmp_path), dtype='float64')
    said = our_said(loaded.config, {'params': loaded.params}, 'float64')
  assert said['states'].dtype == np.float64
  assert_near(said, expected, 1e-12)


def stored(tmp_path, config=CONFIG):
  """The tensors and fields of a saved model, to be changed and read again."""
  from safetensors.numpy import load_file

  params = random_params(config)
  hf.save(str(tmp_path), config, params)
  fields = json.loads((tmp_path / 'config.json').read_text())
  return params, load_file(tmp_path / 'model.safetensors'), fields


def written(tmp_path, tensors, fields):
  from safetensors.numpy import save_file

  save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  return str(tmp_path)


def test_what_older_files_hold_means_the_same(tmp_path):
  params, tensors, fields = stored(tmp_path)
  table = tensors['bert.embeddings.word_embeddings.weight']
  old = {
    name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta'
    ): array
    for name, array in tensors.items()
  }
  old |= {
    'bert.embeddings.position_ids': np.arange(29)[None],
    'cls.predictions.decoder.weight': table.copy(),
    'cls.predictions.decoder.bias': tensors['cls.predictions.bias'].copy(),
    'cls.seq_relationship.weight': np.ones((2, 21), np.float32),
    'cls.seq_relationship.bias': np.ones(2, np.float32),
  }
  for key in ('tie_word_embeddings', 'position_embedding_type'):
    del fields[key]
  loaded = hf.load(written(tmp_path, old, fields))
  assert loaded.config == CONFIG
  assert_equal_trees(loaded.params, params)


def test_names_without_a_prefix_are_those_of_the_encoder(tmp_path):
  config = dataclasses.replace(CONFIG, masked=False)
  params, tensors, fields = stored(tmp_path, config)
  bare = {name.removeprefix('bert.'): a for name, a in tensors.items()}
  bare['embeddings.position_ids'] = np.arange(29)[None]
  loaded = hf.load(written(tmp_path, bare, fields))
  assert loaded.config == config
  assert_equal_trees(loaded.params, params)
  assert hf.load_config(str(tmp_path)) == config


def test_a_tensor_that_no_encoder_has_is_told(tmp_path):
  _, tensors, fields = stored(tmp_path)
  tensors['classifier.weight'] = np.ones((2, 21), np.float32)
  with pytest.raises(CheckpointError, match=r'\+ classifier.weight \[2, 21\]'):
    hf.load(written(tmp_path, tensors, fields))


@pytest.mark.parametrize(
  'change, said',
  [
    ({'is_decoder': True}, 'config.json has is_decoder'),
    ({'position_embedding_type': 'relative_key'}, "expected 'absolute'"),
    ({'hidden_act': 'mish'}, "the activation 'mish'"),
    ({'num_attention_heads': 4}, 'hidden_size 21 and 4 heads'),
  ],
)
def test_what_is_not_supported_is_said(change, said):
  with pytest.raises(CheckpointError, match=said):
    bert_weights.from_hf_fields(SIZES | change, True)


def test_a_config_without_sizes_is_no_berts():
  with pytest.raises(CheckpointError, match='lacks hidden_size'):
    bert_weights.from_hf_fields({'vocab_size': 61}, True)


@pytest.mark.parametrize('masked', [False, True])
def test_an_adapter_of_peft_acts_as_it_does_there(masked, tmp_path):
  """LoRA on queries and both projections of the feed-forward."""
  torch = pytest.importorskip('torch')
  reference = pytest.importorskip('peft')
  base = torch_model('masked' if masked else 'model')
  base.save_pretrained(tmp_path / 'base')
  chosen = reference.LoraConfig(
    r=4,
    target_modules=['query', 'intermediate.dense', 'output.dense'],
    exclude_modules='.*attention.output.dense',
  )
  model = reference.get_peft_model(base, chosen).eval()
  noise = torch.Generator().manual_seed(3)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'lora_B' in name:
        weight.add_(0.1 * torch.randn(weight.shape, generator=noise))
  model.save_pretrained(tmp_path / 'adapter')
  loaded = hf.load(str(tmp_path / 'base'))
  method, tree = peft.load(str(tmp_path / 'adapter'), loaded.config)
  adapter_map = build(method, sites(loaded.config)).adapter_map
  variables = {'params': loaded.params, 'peft': tree}
  said = our_said(loaded.config, variables, adapter_map=adapter_map)
  assert_near(said, torch_said(model), 1e-5)


def test_an_adapter_goes_out_under_the_names_of_its_base(tmp_path):
  config = dataclasses.replace(CONFIG, masked=False)
  leaves = {'lora/a': '{in}r', 'lora/b': 'r{out}'}
  actual = ['encoder/self/q', 'encoder/mlp/wo']
  tree = adapter_tree(config, leaves, actual)
  method = f"lora(rank=7, targets='{'|'.join(actual)}')"
  peft.save(str(tmp_path / 'a'), config, AdapterWeights(method, tree))
  assert_equal_trees(peft.load(str(tmp_path / 'a'), config).tree, tree)
  from safetensors import safe_open

  with safe_open(tmp_path / 'a' / peft.WEIGHTS_FILE, 'numpy') as file:
    names_ = set(file.keys())
  head = 'base_model.model.encoder.layer.0'
  assert f'{head}.attention.self.query.lora_A.weight' in names_
  assert f'{head}.output.dense.lora_B.weight' in names_
  fields = json.loads((tmp_path / 'a' / peft.CONFIG_FILE).read_text())
  assert fields['task_type'] == 'FEATURE_EXTRACTION'


def test_rules_hold_every_array_of_a_model_with_all_parts():
  flat = weight_mapping.flatten(random_params(CONFIG))
  # 3 tables and their norm's 2, 16 of a layer, 2 of the pooler,
  # 4 of the transform and its norm, 1 bias of the head.
  assert len(flat) == 3 + 2 + 16 + 2 + 4 + 1
