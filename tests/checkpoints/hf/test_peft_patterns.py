# SPDX-License-Identifier: Apache-2.0
"""peft's LoRAs whose modules differ in rank and alpha, and those of the
embedding and of the head."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.models import FAMILIES
from moepeft.models.weight_mapping import CheckpointError
from moepeft.peft import build

from ..cases import DECODERS, random_params

CONFIG = dataclasses.replace(DECODERS['qwen2'], vocab=29)
LAYER = 'base_model.model.model.layers'
FIELDS = {
  'peft_type': 'LORA',
  'r': 2,
  'lora_alpha': 6,
  'target_modules': ['q_proj'],
}
IDS = np.random.default_rng(0).integers(3, 29, (2, 7))


def arrays_of(module, rank, inner, outer, layers=range(3), seed=1):
  """{name: array} of a LoRA at a module of each layer."""
  rng = np.random.default_rng(seed)
  shapes = {'A': (rank, inner), 'B': (outer, rank)}
  return {
    f'{LAYER}.{i}.{module}.lora_{x}.weight': rng.normal(size=shape).astype('f4')
    for i in layers
    for x, shape in shapes.items()
  }


def write(folder, arrays, **fields):
  folder.mkdir(exist_ok=True)
  save_file(arrays, folder / peft.WEIGHTS_FILE)
  (folder / peft.CONFIG_FILE).write_text(json.dumps(FIELDS | fields))
  return str(folder)


def logits(config, params, adapter=None):
  family = FAMILIES[config.family]
  variables = {'params': params}
  module = family.module(config)
  if adapter is not None:
    built = build(adapter.method, family.sites(config))
    module = family.module(config, built.adapter_map)
    variables['peft'] = adapter.tree
  return np.asarray(
    module.apply(variables, {'decoder_inputs': IDS, 'inputs': IDS})
  )


def changed(params, path, layer, delta):
  """The parameters with a kernel's layer changed; `delta` is [in, out]."""
  import copy

  params = copy.deepcopy(params)
  node = params
  for key in path.split('/'):
    node = node[key]
  kernel = node['kernel'] if layer is None else node['kernel'][layer]
  kernel += delta.reshape(kernel.shape)
  return params


def test_layers_of_other_ranks_and_alphas_act_as_in_peft(tmp_path):
  # q: rank 2, alpha 6, but layer 1 has rank 3 and alpha 12: its term is
  # scaled by 4, the others' by 3. v: rank 2, alpha 5 everywhere.
  q = arrays_of('self_attn.q_proj', 2, 12, 24, layers=(0, 2))
  q |= arrays_of('self_attn.q_proj', 3, 12, 24, layers=(1,), seed=2)
  v = arrays_of('self_attn.v_proj', 2, 12, 8, seed=3)
  path = write(
    tmp_path / 'a',
    q | v,
    rank_pattern={r'layers.1.self_attn.q_proj': 3},
    alpha_pattern={r'layers\.1\.self_attn\.q_proj': 12, 'v_proj': 5},
  )
  params = random_params(CONFIG)
  adapter = peft.load(path, CONFIG)
  assert adapter.method == (
    "lora(rank=3, alpha=12, targets='decoder/self/q') + "
    "lora(rank=2, alpha=5, targets='decoder/self/v')"
  )
  merged = params
  scales = {'q_proj': (3, 4, 3), 'v_proj': (2.5, 2.5, 2.5)}
  for module, by_layer in scales.items():
    for layer, scale in enumerate(by_layer):
      name = f'{LAYER}.{layer}.self_attn.{module}.lora_'
      a, b = ((q | v)[f'{name}{x}.weight'] for x in 'AB')
      site = f'decoder/layers/self/{module[0]}'
      merged = changed(merged, site, layer, scale * (b @ a).T)
  # Sums of tens of products of order one, in another order.
  np.testing.assert_allclose(
    logits(CONFIG, params, adapter), logits(CONFIG, merged), atol=1e-3
  )


def test_what_has_two_ranks_is_written_and_read_again(tmp_path):
  arrays = arrays_of('self_attn.q_proj', 2, 12, 24)
  arrays |= arrays_of('mlp.up_proj', 5, 12, 13, seed=2)
  path = write(tmp_path / 'a', arrays, rank_pattern={'up_proj': 5})
  adapter = peft.load(path, CONFIG)
  peft.save(tmp_path / 'b', CONFIG, adapter)
  fields = json.loads((tmp_path / 'b' / peft.CONFIG_FILE).read_text())
  assert (fields['r'], fields['lora_alpha']) == (2, 6)
  (pattern,) = fields['rank_pattern'].items()
  assert pattern == (r'model\.layers\.\d+\.mlp\.up_proj', 5)
  again = load_file(tmp_path / 'b' / peft.WEIGHTS_FILE)
  assert again.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(again[name], array)
  assert peft.load(str(tmp_path / 'b'), CONFIG).method == adapter.method


@pytest.mark.parametrize('tied', [True, False])
def test_the_embedding_and_the_head_are_read(tmp_path, tied):
  config = dataclasses.replace(CONFIG, tied=tied)
  params = random_params(config)
  rng = np.random.default_rng(5)
  table = rng.normal(size=(2, 29)).astype('f4')
  up = rng.normal(size=(12, 2)).astype('f4')
  a = rng.normal(size=(2, 12)).astype('f4')
  b = rng.normal(size=(29, 2)).astype('f4')
  top = 'base_model.model'
  path = write(
    tmp_path / 'a',
    {
      f'{top}.model.embed_tokens.lora_embedding_A': table,
      f'{top}.model.embed_tokens.lora_embedding_B': up,
      # peft keeps the frozen tables too.
      f'{top}.model.embed_tokens.base_layer.weight': np.zeros((29, 12), 'f4'),
      f'{top}.lm_head.lora_A.weight': a,
      f'{top}.lm_head.lora_B.weight': b,
      f'{top}.lm_head.base_layer.weight': np.zeros((29, 12), 'f4'),
    },
    target_modules=['embed_tokens', 'lm_head'],
  )
  adapter = peft.load(path, config)
  assert adapter.method == "lora(rank=2, alpha=6, targets='embed|head')"
  # The head keeps the table without the embedding's term.
  untied = dataclasses.replace(config, tied=False)
  head = (
    params['head']['kernel'] if not tied else params['embed']['embedding'].T
  )
  # alpha / r = 3
  merged = params | {
    'embed': {'embedding': params['embed']['embedding'] + 3 * (up @ table).T},
    'head': {'kernel': head + 3 * (b @ a).T},
  }
  np.testing.assert_allclose(
    logits(config, params, adapter), logits(untied, merged), atol=1e-3
  )
  peft.save(tmp_path / 'b', config, adapter)
  assert peft.load(str(tmp_path / 'b'), config).method == adapter.method


def test_a_resized_vocabulary_is_refused(tmp_path):
  arrays = arrays_of('self_attn.q_proj', 2, 12, 24)
  name = 'base_model.model.model.embed_tokens.base_layer.weight'
  path = write(tmp_path / 'a', arrays | {name: np.zeros((31, 12), 'f4')})
  with pytest.raises(CheckpointError, match='vocabulary was resized'):
    peft.load(path, CONFIG)


ODD = [
  ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
  ({'modules_to_save': 'lm_head'}, 'modules_to_save'),
  ({'r': '2'}, "an integer in 'r'"),
  ({'r': 0}, "'r'"),
  ({'r': 2**40}, "'r'"),
  ({'r': None}, "'r'"),
  ({'lora_alpha': None}, "'lora_alpha'"),
  ({'lora_alpha': float('nan')}, "'lora_alpha'"),
  ({'lora_alpha': [3]}, "'lora_alpha'"),
  ({'lora_dropout': 1.5}, 'lora_dropout'),
  ({'use_dora': 'yes'}, 'use_dora'),
  ({'rank_pattern': [3]}, 'rank_pattern'),
  ({'rank_pattern': {'q_proj': 'x'}}, 'rank_pattern'),
  ({'rank_pattern': {'q_proj': 0}}, 'rank_pattern'),
  ({'rank_pattern': {'q_proj': 3}}, 'has the rank 2'),
  ({'rank_pattern': {'(a+)+$': 3}}, 'simple pattern'),
  ({'rank_pattern': {'(': 3}}, 'regular expression'),
  ({'alpha_pattern': {'q_proj': None}}, 'alpha_pattern'),
  ({'bias': ['all']}, 'bias'),
  ({'peft_type': ['LORA']}, 'type'),
  ({'base_model_name_or_path': 3}, 'base_model_name_or_path'),
  ({'init_lora_weights': {'a': 1}}, 'init_lora_weights'),
]


@pytest.mark.parametrize('fields, reason', ODD, ids=lambda v: str(v)[:40])
def test_odd_fields_are_one_sentence(tmp_path, fields, reason):
  arrays = arrays_of('self_attn.q_proj', 2, 12, 24)
  path = write(tmp_path / 'a', arrays, **fields)
  with pytest.raises(CheckpointError, match=reason) as error:
    peft.load(path, CONFIG)
  assert '\n' not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
  'tied, options',
  [
    (False, dict(target_modules=['embed_tokens', 'q_proj'])),
    (True, dict(target_modules=['embed_tokens', 'lm_head'])),
    (
      False,
      dict(
        target_modules=['q_proj', 'v_proj'],
        rank_pattern={'q_proj': 3, r'layers.1.self_attn.v_proj': 5},
        alpha_pattern={'v_proj': 5},
        use_rslora=True,
      ),
    ),
  ],
)
@pytest.mark.filterwarnings('ignore')
def test_logits_are_those_of_peft(tmp_path, tied, options):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  reference = pytest.importorskip('peft')
  config = dataclasses.replace(CONFIG, tied=tied)
  params = random_params(config)
  hf.save(tmp_path / 'm', config, params)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm')
  torch.manual_seed(0)
  adapted = reference.get_peft_model(
    model, reference.LoraConfig(r=2, task_type='CAUSAL_LM', **options)
  )
  for name, weight in adapted.named_parameters():
    if 'lora_' in name:
      torch.nn.init.normal_(weight, std=0.3)
  adapted.save_pretrained(tmp_path / 'a')
  with torch.no_grad():
    expected = adapted.eval()(torch.tensor(IDS)).logits.numpy()
  actual = logits(config, params, peft.load(str(tmp_path / 'a'), config))
  # Sums of tens of float32 products, in another order.
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )
