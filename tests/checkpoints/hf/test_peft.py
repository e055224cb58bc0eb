# SPDX-License-Identifier: Apache-2.0
"""Adapters of Hugging Face's peft, both ways."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft, peft_config
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError

from ..cases import (
  CONFIGS,
  adapter_tree,
  assert_equal_trees,
  random_params,
  random_tree,
)

CONFIG = CONFIGS['gated-untied']
LORA = {'lora/a': '{in}r', 'lora/b': 'r{out}'}
OUT, IN = {'ia3/scale': '{out}'}, {'ia3/scale': '{in}'}


def merged(*trees):
  flat = {}
  for tree in trees:
    flat |= weight_mapping.flatten(tree)
  return weight_mapping.unflatten(flat)


def lora(sites, *options):
  """A random LoRA of rank 7 at some sites."""
  known = '|'.join(sites)
  text = ', '.join(('rank=7', *options, f'targets={known!r}'))
  return AdapterWeights(f'lora({text})', adapter_tree(CONFIG, LORA, sites))


ADAPTERS = {
  'lora': lora(['encoder/self/q', 'decoder/mlp/wo'], 'alpha=3'),
  'lora-cross': lora(['decoder/cross/q', 'decoder/cross/o'], 'alpha=8'),
  'rslora': lora(['decoder/self/o'], 'alpha=8', 'rslora=True'),
  'ia3': AdapterWeights(
    "ia3(targets='decoder/cross/k|encoder/mlp/wi_0')",
    adapter_tree(CONFIG, OUT, ['encoder/mlp/wi_0', 'decoder/cross/k']),
  ),
  'ia3-hidden': AdapterWeights(
    "ia3(targets='encoder/self/k|*/mlp/hidden')",
    adapter_tree(
      CONFIG,
      OUT,
      ['encoder/self/k', 'encoder/mlp/hidden', 'decoder/mlp/hidden'],
    ),
  ),
  'ia3-both-sides': AdapterWeights(
    "ia3(targets='encoder/self/v') + ia3(on='input', targets='encoder/self/o')",
    merged(
      adapter_tree(CONFIG, OUT, ['encoder/self/v']),
      adapter_tree(CONFIG, {'ia3_2/scale': '{in}'}, ['encoder/self/o']),
    ),
  ),
  'ia3-inputs': AdapterWeights(
    "ia3(on='input', targets='decoder/cross/o')",
    adapter_tree(CONFIG, IN, ['decoder/cross/o']),
  ),
}


@pytest.fixture(params=ADAPTERS)
def adapter(request):
  return ADAPTERS[request.param]


def edit(folder, **changes):
  file = folder / peft.CONFIG_FILE
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_round_trip_keeps_method_and_bits(adapter, tmp_path):
  peft.save(tmp_path / 'a', CONFIG, adapter)
  loaded = peft.load(str(tmp_path / 'a'), CONFIG)
  assert_equal_trees(loaded.tree, adapter.tree)
  peft.save(tmp_path / 'b', CONFIG, loaded)
  for name in (peft.WEIGHTS_FILE, peft.CONFIG_FILE):
    assert (tmp_path / 'a' / name).read_bytes() == (
      tmp_path / 'b' / name
    ).read_bytes()


@pytest.mark.parametrize('name', ['lora', 'rslora', 'ia3-both-sides'])
def test_method_is_inferred(name, tmp_path):
  adapter = ADAPTERS[name]
  peft.save(tmp_path / 'a', CONFIG, adapter)
  method = peft.load(str(tmp_path / 'a'), CONFIG).method
  assert method == adapter.method


def test_peft_gives_the_same_logits(adapter, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  reference = pytest.importorskip('peft')

  hf.save(tmp_path / 'base', CONFIG, PARAMS)
  peft.save(tmp_path / 'a', CONFIG, adapter, base=str(tmp_path / 'base'))
  model = transformers.T5ForConditionalGeneration.from_pretrained(
    tmp_path / 'base'
  )
  model = reference.PeftModel.from_pretrained(model, tmp_path / 'a').eval()
  with torch.no_grad():
    expected = model(
      input_ids=torch.tensor(INPUTS), decoder_input_ids=torch.tensor(OUTPUTS)
    ).logits.numpy()
  actual = logits(adapter)
  # Sums of tens of float32 products, in another order.
  tolerance = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
  assert np.abs(logits(None) - expected).max() > 100 * tolerance


PARAMS = random_params(CONFIG)
INPUTS = np.array([[3, 17, 5, 28, 9], [8, 4, 22, 11, 6]])
OUTPUTS = np.array([[0, 7, 19], [0, 25, 2]])


def logits(adapter):
  """The logits of moepeft's model, with an adapter or without one."""
  from moepeft.models.t5.model import T5, sites
  from moepeft.nn.adapter_hook import AdapterMap
  from moepeft.peft import build

  adapter_map, variables = AdapterMap(), {'params': PARAMS}
  if adapter is not None:
    adapter_map = build(adapter.method, sites(CONFIG)).adapter_map
    variables |= {'peft': adapter.tree}
  batch = {'inputs': INPUTS, 'decoder_inputs': OUTPUTS}
  return np.asarray(T5(CONFIG, adapter_map).apply(variables, batch))


def test_a_lora_from_kernels_becomes_one_of_twice_the_rank(tmp_path):
  leaves = LORA | {'lora/initial_a': '{in}r', 'lora/initial_b': 'r{out}'}
  sites = ['encoder/self/q', 'decoder/cross/o']
  text = f'rank=7, alpha=3, rslora=True, targets={"|".join(sites)!r}'
  adapter = AdapterWeights(
    f"lora({text}, init_weights='pissa')", adapter_tree(CONFIG, leaves, sites)
  )
  peft.save(tmp_path / 'a', CONFIG, adapter)
  loaded = peft.load(str(tmp_path / 'a'), CONFIG)
  # The scale stays: 3 / sqrt(7) = 15.8745 / 14.
  assert loaded.method.startswith('lora(rank=14, alpha=15.8745')
  expected = logits(adapter)
  tolerance = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(logits(loaded), expected, atol=tolerance)


def test_names_and_shapes_are_pefts(tmp_path):
  peft.save(tmp_path / 'a', CONFIG, ADAPTERS['lora-cross'])
  arrays = load_file(tmp_path / 'a' / peft.WEIGHTS_FILE)
  place = 'base_model.model.decoder.block.3.layer.1.EncDecAttention'
  assert arrays[f'{place}.q.lora_A.weight'].shape == (7, 11)
  assert arrays[f'{place}.q.lora_B.weight'].shape == (15, 7)
  assert arrays[f'{place}.o.lora_A.weight'].shape == (7, 15)
  peft.save(tmp_path / 'b', CONFIG, ADAPTERS['ia3-both-sides'])
  arrays = load_file(tmp_path / 'b' / peft.WEIGHTS_FILE)
  place = 'base_model.model.encoder.block.0.layer.0.SelfAttention'
  assert arrays[f'{place}.v.ia3_l'].shape == (15, 1)
  assert arrays[f'{place}.o.ia3_l'].shape == (1, 15)


def test_short_target_modules_where_they_select_the_same(tmp_path):
  # 'q' of one attention only needs full names, all q's do not.
  some = lora(['encoder/self/q'])
  every = lora(['encoder/self/q', 'decoder/self/q', 'decoder/cross/q'])
  for name, adapter in (('some', some), ('every', every)):
    peft.save(tmp_path / name, CONFIG, adapter)
  assert peft_config.read(tmp_path / 'every')['target_modules'] == ['q']
  assert peft_config.read(tmp_path / 'some')['target_modules'] == [
    f'encoder.block.{i}.layer.0.SelfAttention.q' for i in range(2)
  ]


def test_an_earlier_config_is_kept_where_it_holds(tmp_path):
  adapter = ADAPTERS['lora-cross']
  like = {
    'peft_type': 'LORA',
    'target_modules': r'.*\.EncDecAttention\.(o|q)',
    'task_type': None,
    'base_model_name_or_path': 'google/t5',
    'revision': 'main',
  }
  peft.save(tmp_path / 'a', CONFIG, adapter, like=like)
  fields = peft_config.read(tmp_path / 'a')
  assert {key: fields[key] for key in like} == like
  assert fields['lora_alpha'] == 8
  stale = like | {'target_modules': ['q'], 'layers_to_transform': [0]}
  peft.save(tmp_path / 'b', CONFIG, adapter, like=stale)
  fields = peft_config.read(tmp_path / 'b')
  assert len(fields['target_modules']) == 8
  assert fields['layers_to_transform'] is None


def test_layers_that_a_lora_leaves_out_are_zero_and_stay_out(tmp_path):
  adapter = lora(['decoder/self/q'])
  peft.save(tmp_path / 'a', CONFIG, adapter)
  file = tmp_path / 'a' / peft.WEIGHTS_FILE
  arrays = load_file(file)
  remaining = {n: a for n, a in arrays.items() if '.block.0.' not in n}
  save_file(remaining, file)
  loaded = peft.load(str(tmp_path / 'a'), CONFIG)
  for leaf in weight_mapping.flatten(loaded.tree).values():
    assert not leaf[0].any() and leaf[1:].all()
  peft.save(tmp_path / 'b', CONFIG, loaded)
  assert (
    load_file(tmp_path / 'b' / peft.WEIGHTS_FILE).keys() == remaining.keys()
  )
  targets = peft_config.read(tmp_path / 'b')['target_modules']
  assert targets == [
    f'decoder.block.{i}.layer.0.SelfAttention.q' for i in (1, 2, 3)
  ]


@pytest.mark.parametrize(
  'field',
  [
    {'bias': 'lora_only'},
    {'lora_bias': True},
    {'init_lora_weights': 'pissa'},
    {'use_something_new': True},
  ],
  ids=lambda field: next(iter(field)),
)
def test_what_is_not_supported_is_refused_by_name(field, tmp_path):
  peft.save(tmp_path / 'a', CONFIG, ADAPTERS['lora'])
  edit(tmp_path / 'a', **field)
  name, value = next(iter(field.items()))
  with pytest.raises(CheckpointError) as error:
    peft.load(str(tmp_path / 'a'), CONFIG)
  assert f'{name}={value!r}' in str(error.value)


def test_adapters_of_less_precision_are_read_as_float32(tmp_path):
  peft.save(tmp_path / 'a', CONFIG, ADAPTERS['lora'])
  file = tmp_path / 'a' / peft.WEIGHTS_FILE
  half = {n: a.astype(np.float16) for n, a in load_file(file).items()}
  save_file(half, file)
  for dtype, remaining in (('float32', np.float32), (None, np.float16)):
    tree = peft.load(str(tmp_path / 'a'), CONFIG, dtype).tree
    assert {leaf.dtype for leaf in weight_mapping.flatten(tree).values()} == {
      np.dtype(remaining)
    }


def test_another_type_is_refused(tmp_path):
  peft.save(tmp_path / 'a', CONFIG, ADAPTERS['lora'])
  edit(tmp_path / 'a', peft_type='OFT')
  with pytest.raises(CheckpointError, match="'OFT'; LORA, IA3"):
    peft.load(str(tmp_path / 'a'), CONFIG)


def test_an_adapter_of_another_model_is_shown_as_a_diff(tmp_path):
  peft.save(tmp_path / 'a', CONFIG, ADAPTERS['lora'])
  wider = CONFIGS['gated-untied'].__class__(**(vars(CONFIG) | {'d_model': 12}))
  with pytest.raises(CheckpointError) as error:
    peft.load(str(tmp_path / 'a'), wider)
  name = 'encoder.block.0.layer.0.SelfAttention.q.lora_A.weight'
  assert f'- base_model.model.{name} [7, 12]' in str(error.value)
  assert f'+ base_model.model.{name} [7, 11]' in str(error.value)


def test_methods_without_a_form_in_peft_are_refused(tmp_path):
  leaves = {'molora/a': '{in}er', 'molora/b': 'er{out}'}
  tree = adapter_tree(CONFIG, leaves, ['encoder/self/q'])
  with pytest.raises(CheckpointError, match='peft cannot represent'):
    peft.save(tmp_path / 'a', CONFIG, AdapterWeights('molora(rank=7)', tree))


def test_two_scales_at_one_module_are_refused(tmp_path):
  sites = ['encoder/mlp/act', 'encoder/mlp/hidden']
  tree = adapter_tree(CONFIG, OUT, sites)
  with pytest.raises(CheckpointError, match='one scale per module'):
    peft.save(tmp_path / 'a', CONFIG, AdapterWeights('ia3', tree))


def test_sites_without_a_projection_are_refused(tmp_path):
  tree = random_tree({'embed/lora/a': (29, 7), 'embed/lora/b': (7, 11)})
  with pytest.raises(CheckpointError, match='this adapter is at embed'):
    peft.save(
      tmp_path / 'a', CONFIG, AdapterWeights("lora(targets='embed')", tree)
    )


def test_a_truncated_file_is_one_sentence(tmp_path):
  peft.save(tmp_path / 'a', CONFIG, ADAPTERS['lora'])
  file = tmp_path / 'a' / peft.WEIGHTS_FILE
  file.write_bytes(file.read_bytes()[:-9])
  with pytest.raises(CheckpointError, match='truncated or damaged'):
    peft.load(str(tmp_path / 'a'), CONFIG)
