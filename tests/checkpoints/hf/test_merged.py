# SPDX-License-Identifier: Apache-2.0
"""Adapters merged into decoders: one directory that others read."""

import json
from pathlib import Path

import numpy as np
import pytest

from moepeft import convert
from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.models import weight_mapping
from moepeft.models.decoder.model import Decoder, sites
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft import build

from ..cases import (
  DECODERS,
  GPT2,
  adapter_tree,
  assert_equal_trees,
  random_params,
)

LORA_LEAVES = {'lora/a': '{in}r', 'lora/b': 'r{out}'}
DORA_LEAVES = {
  'dora/a': '{in}r',
  'dora/b': 'r{out}',
  'dora/magnitude': '{out}',
}
# Outputs with biases among them; each with (IA)^3 around or beside it.
AT = ['decoder/self/q', 'decoder/self/v', 'decoder/self/o', 'decoder/mlp/wo']
SCALED = ['decoder/self/k', 'decoder/self/v', 'decoder/mlp/act']
INPUTS = np.array([[3, 17, 5, 28, 9, 11], [8, 4, 22, 11, 6, 2]])

every_family = pytest.mark.parametrize('family', DECODERS)


def adapter_of(config, kind):
  """A LoRA or DoRA of rank 7, with (IA)^3 around."""
  leaves = {'lora': LORA_LEAVES, 'dora': DORA_LEAVES}[kind]
  flat = weight_mapping.flatten(adapter_tree(config, leaves, AT))
  # Around one, where they start.
  scales = adapter_tree(config, {'ia3/scale': '{out}'}, SCALED, seed=2)
  flat |= {k: 1 + a / 2 for k, a in weight_mapping.flatten(scales).items()}
  method = f"{kind}(rank=7, alpha=3, targets='{'|'.join(AT)}')"
  method += f" + ia3(targets='{'|'.join(SCALED)}')"
  return AdapterWeights(method, weight_mapping.unflatten(flat))


def logits(config, params, adapter=None):
  adapter_map, variables = AdapterMap(), {'params': params}
  if adapter is not None:
    adapter_map = build(adapter.method, sites(config)).adapter_map
    variables['peft'] = adapter.tree
  model = Decoder(config, adapter_map)
  return np.asarray(model.apply(variables, {'inputs': INPUTS}))


@pytest.fixture(params=['lora', 'dora'])
def kind(request):
  return request.param


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A work place, run as the command line would."""
  monkeypatch.chdir(tmp_path)

  def run(*arguments):
    assert convert.main(['convert', *arguments]) == 0

  return run


def export(config, params, adapter):
  hf.save('base', config, params)
  sha256 = weight_mapping.content_hash(params)
  card = adapter_lib.describe(
    adapter.method, 'official', 'base', sha256, config.family, config
  )
  adapter_lib.save('adapter', adapter.tree, json.loads(json.dumps(card)))


@every_family
def test_merged_gives_the_adapted_logits_here_and_in_transformers(
  folder, family, kind
):
  config = DECODERS[family]
  params, adapter = random_params(config), adapter_of(config, kind)
  export(config, params, adapter)
  folder('--input=adapter', '--output=out', '--to=hf')
  merged = hf.load('out')
  assert merged.config == config
  expected = logits(config, params, adapter)
  # Sums of tens of float32 products, in another order.
  tolerance = 1e-5 * np.abs(expected).max()
  actual = logits(config, merged.params)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
  plain = logits(config, params)
  assert np.abs(plain - expected).max() > 100 * tolerance

  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    'out', attn_implementation='eager'
  ).eval()
  with torch.no_grad():
    actual = reference(input_ids=torch.tensor(INPUTS)).logits.numpy()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@every_family
def test_cards_of_decoders_are_read_back_as_they_were(folder, family):
  config = DECODERS[family]
  adapter = adapter_of(config, 'lora')
  export(config, random_params(config), adapter)
  tree, card = adapter_lib.load('adapter')
  assert adapter_lib.config_of(card) == config
  assert_equal_trees(tree, adapter.tree)


@every_family
def test_peft_goes_to_moepeft_and_back(folder, family, kind):
  config = DECODERS[family]
  hf.save('base', config, random_params(config))
  leaves = {'lora': LORA_LEAVES, 'dora': DORA_LEAVES}[kind]
  method = f"{kind}(rank=7, alpha=3, rslora=True, targets='{'|'.join(AT)}')"
  adapter = AdapterWeights(method, adapter_tree(config, leaves, AT))
  peft.save('a', config, adapter, base='base')
  folder('--input=a', '--output=b', '--to=moepeft')
  folder('--input=b', '--output=c', '--to=peft')
  for file in (peft.WEIGHTS_FILE, peft.CONFIG_FILE):
    assert Path('a', file).read_bytes() == Path('c', file).read_bytes()
  actual = peft.load('c', config)
  assert actual.method == method
  assert_equal_trees(actual.tree, adapter.tree)


def test_a_dora_that_lacks_a_layer_is_refused(folder):
  config = DECODERS['llama']
  adapter = AdapterWeights(
    "dora(rank=7, targets='decoder/self/q')",
    adapter_tree(config, DORA_LEAVES, AT[:1]),
  )
  peft.save('a', config, adapter)
  arrays = hf.directory.Tensors([Path('a', peft.WEIGHTS_FILE)])
  remaining = {
    n: arrays.fetch(n) for n in arrays.shapes if '.layers.1.' not in n
  }
  peft.save_file(remaining, Path('a', peft.WEIGHTS_FILE))
  with pytest.raises(
    weight_mapping.CheckpointError, match='no magnitude vector of .*layers.1'
  ):
    peft.load('a', config)


def test_adapters_of_modules_that_projections_share_are_refused(folder):
  adapter = AdapterWeights(
    "lora(rank=7, targets='decoder/self/q')",
    adapter_tree(GPT2, LORA_LEAVES, AT[:1]),
  )
  with pytest.raises(
    weight_mapping.CheckpointError, match='one module .* attn.c_attn'
  ):
    peft.save('a', GPT2, adapter)


def test_others_of_gpt2_go_out_and_come_back(folder):
  # peft's config says of Conv1D that kernels are [in, out]; A and B are not.
  method = "lora(rank=7, alpha=3, targets='decoder/self/o|decoder/mlp/wo')"
  adapter = AdapterWeights(method, adapter_tree(GPT2, LORA_LEAVES, AT[2:]))
  peft.save('a', GPT2, adapter)
  file = Path('a', peft.CONFIG_FILE)
  fields = json.loads(file.read_text()) | {'fan_in_fan_out': True}
  file.write_text(json.dumps(fields))
  actual = peft.load('a', GPT2)
  assert actual.method == method
  assert_equal_trees(actual.tree, adapter.tree)


def test_bits_of_a_base_that_no_adapter_touches_stay(folder):
  config = DECODERS['qwen2']
  params, adapter = random_params(config), adapter_of(config, 'lora')
  export(config, params, adapter)
  folder('--input=adapter', '--output=out', '--to=hf')
  merged = weight_mapping.flatten(hf.load('out').params)
  changed = {
    path
    for path, leaf in weight_mapping.flatten(params).items()
    if not np.array_equal(leaf, merged[path])
  }
  at = 'decoder/layers'
  assert changed == {
    *(f'{at}/self/{name}/kernel' for name in 'qkvo'),
    f'{at}/mlp/wo/kernel',
    # LoRA leaves biases alone, a scale of outputs does not.
    *(f'{at}/self/{name}/bias' for name in 'kv'),
  }
