# SPDX-License-Identifier: Apache-2.0
"""T5X checkpoints, base and the released code's adapters."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import flax.serialization
import numpy as np
import pytest

from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.t5x import model as t5x
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError
from tests import ROOT

from ..cases import (
  CONFIGS,
  adapter_tree,
  assert_equal_trees,
  random_params,
  released_arrays,
)

CONFIG = CONFIGS['gated-untied']
FIXTURES = ROOT.parent / 'shared' / 'fixtures'
OFFICIAL = Path(os.environ.get('MOEPEFT_FIXTURES', FIXTURES)) / 'official'
ATTENTION = ('encoder/self', 'decoder/self', 'decoder/cross')
MLP = ('encoder/mlp', 'decoder/mlp')


def low_rank_sites(gate):
  heads = [f'{place}/{x}' for place in ATTENTION for x in 'qkvo']
  return heads + [f'{place}/{x}' for place in MLP for x in (gate, 'wo')]


def scale_sites():
  heads = [f'{place}/{x}' for place in ATTENTION for x in 'kv']
  return heads + [f'{place}/act' for place in MLP]


LOW_RANK = {'lora/a': '{in}r', 'lora/b': 'r{out}'}
MIXTURE = {
  'molora/a': '{in}er',
  'molora/b': 'er{out}',
  'molora/router/kernel': '({in})e',
}
WHERE = (
  "targets='*/self/q|*/self/k|*/self/v|*/self/o|*/mlp/wi_0|*/mlp/wo|"
  "decoder/cross/q|decoder/cross/k|decoder/cross/v|decoder/cross/o')"
)
SCALED = (
  "targets='*/self/k|*/self/v|decoder/cross/k|decoder/cross/v|*/mlp/act')"
)


def mov_tree():
  """Heads share a head-sized router, the feed-forward has a wide one."""
  heads = [site for site in scale_sites() if not site.endswith('act')]
  taps = [site for site in scale_sites() if site.endswith('act')]
  scale, router = 'mov/scale', 'mov/router/kernel'
  tree = adapter_tree(CONFIG, {scale: 'enh', router: 'he'}, heads)
  flat = weight_mapping.flatten(tree)
  tree = adapter_tree(CONFIG, {scale: 'ef', router: 'fe'}, taps, seed=2)
  return weight_mapping.unflatten(flat | weight_mapping.flatten(tree))


ADAPTERS = {
  'lora': AdapterWeights(
    f'lora(rank=7, alpha=16, {WHERE}',
    adapter_tree(CONFIG, LOW_RANK, low_rank_sites('wi_0')),
  ),
  'molora': AdapterWeights(
    f'molora(experts=2, rank=7, alpha=16, router=softmax, {WHERE}',
    adapter_tree(CONFIG, MIXTURE, low_rank_sites('wi_0')),
  ),
  'ia3': AdapterWeights(
    f'ia3({SCALED}',
    adapter_tree(CONFIG, {'ia3/scale': '{out}'}, scale_sites()),
  ),
  'mov': AdapterWeights(
    f"mov(experts=2, router=softmax, reads='heads', {SCALED}", mov_tree()
  ),
}


@pytest.fixture(params=ADAPTERS)
def adapter(request):
  return ADAPTERS[request.param]


def test_base_round_trip_is_exact(config, tmp_path):
  params = random_params(config)
  t5x.save(tmp_path / 'x', config, params, step=7)
  loaded = t5x.load(str(tmp_path / 'x' / 'checkpoint_7'))
  assert loaded.config == config == t5x.load_config(str(tmp_path / 'x'))
  assert loaded.adapter is None
  assert_equal_trees(loaded.params, params)


def test_hugging_face_and_t5x_copies_hash_alike(config, tmp_path):
  params = random_params(config)
  t5x.save(tmp_path / 'x', config, params)
  hf.save(tmp_path / 'h', config, params)
  actual = weight_mapping.content_hash(params)
  assert t5x.load(str(tmp_path / 'x')).sha256 == actual
  assert hf.load(str(tmp_path / 'h')).sha256 == actual


def test_adapter_round_trip_is_exact(adapter, tmp_path):
  params = random_params(CONFIG)
  t5x.save(tmp_path / 'x', CONFIG, params, adapter)
  loaded = t5x.load(str(tmp_path / 'x'))
  assert_equal_trees(loaded.params, params)
  assert loaded.sha256 == weight_mapping.content_hash(params)
  assert loaded.adapter.method == adapter.method
  assert_equal_trees(loaded.adapter.tree, adapter.tree)


def read_form(folder):
  """(the index without param_states, the weights' .zarray and chunks)."""
  packed = (folder / 'checkpoint').read_bytes()
  index = flax.serialization.msgpack_restore(packed)
  index['optimizer']['state'].pop('param_states', None)
  arrays = {}
  for place in folder.glob('target.*'):
    metadata = json.loads((place / '.zarray').read_text())
    arrays[place.name] = metadata, sorted(p.name for p in place.iterdir())
  return index, arrays


@pytest.mark.skipif(
  not OFFICIAL.is_dir(), reason=f'{OFFICIAL} is not part of the project'
)
@pytest.mark.parametrize('name', ['t5x_t5', 't5x_molora'])
def test_what_is_written_has_the_form_that_t5x_writes(name, tmp_path):
  (reference,) = (OFFICIAL / name).glob('checkpoint_*')
  step = int(reference.name.rpartition('_')[2])
  loaded = t5x.load(str(reference))
  assert (loaded.adapter is not None) == (name == 't5x_molora')
  t5x.save(tmp_path / 'x', loaded.config, loaded.params, loaded.adapter, step)
  actual = tmp_path / 'x' / reference.name
  assert read_form(actual) == read_form(reference)
  again = t5x.load(str(actual))
  assert_equal_trees(again.params, loaded.params)
  assert again.sha256 == loaded.sha256
  if loaded.adapter is not None:
    assert again.adapter.method == loaded.adapter.method
    assert_equal_trees(again.adapter.tree, loaded.adapter.tree)


@pytest.mark.parametrize(
  'method',
  [
    'molora(rank=3)',
    *(
      pytest.param(method, marks=pytest.mark.slow)
      for method in ('ia3', 'lora(rank=3)', 'mov(experts=3)')
    ),
  ],
)
def test_what_a_run_trains_goes_out_and_comes_back(method, tmp_path):
  pytest.importorskip('jax')
  from moepeft.models.t5.model import T5, sites
  from moepeft.nn.initializers import init_params
  from moepeft.peft import build
  from moepeft.peft.build import function_of

  built = build(method, sites(CONFIG))
  batch = {key: np.ones((1, 2), int) for key in ('inputs', 'decoder_inputs')}
  tree = init_params(T5(CONFIG, built.adapter_map), batch, 0)['peft']
  adapter = AdapterWeights(built.method, tree)
  t5x.save(tmp_path / 'x', CONFIG, random_params(CONFIG), adapter)
  actual = t5x.load(str(tmp_path / 'x')).adapter
  assert_equal_trees(actual.tree, tree)
  again = build(actual.method, sites(CONFIG))
  assert function_of(again.adapter_map) == function_of(built.adapter_map)


def test_inferred_method_builds_the_tree_that_was_read(adapter):
  jax = pytest.importorskip('jax')
  from moepeft.models.t5.model import T5, sites
  from moepeft.peft import build

  built = build(adapter.method, sites(CONFIG))
  batch = {key: np.ones((1, 2), int) for key in ('inputs', 'decoder_inputs')}
  keys = {'params': jax.random.key(0), 'peft': jax.random.key(1)}
  model = T5(CONFIG, built.adapter_map)
  tree = jax.eval_shape(lambda: model.init(keys, batch))['peft']
  shapes = {
    path: leaf.shape for path, leaf in weight_mapping.flatten(tree).items()
  }
  stored = weight_mapping.flatten(adapter.tree)
  assert {path: leaf.shape for path, leaf in stored.items()} == shapes


def test_released_names_and_axes():
  adapter = ADAPTERS['molora']
  arrays = released_arrays(CONFIG, adapter)
  a = arrays['decoder/layers_3/encoder_decoder_attention/lora_q_conv/lora_A']
  assert a.shape == (2, 11, 7)
  actual = adapter.tree['decoder']['layers']['cross']['q']['molora']['a']
  # [l, d, e, r] here, [e, d, r] there.
  np.testing.assert_array_equal(a, actual[3].transpose(1, 0, 2))
  b = arrays['encoder/layers_1/attention/lora_v_conv/lora_B']
  assert b.shape == (2, 7, 15)
  name = 'decoder/layers_0/mlp/lora_output_conv/router/router_weights/v/kernel'
  assert arrays[name].shape == (13, 2)
  scaling = released_arrays(CONFIG, ADAPTERS['mov'])
  name = 'encoder/layers_0/attention/k_conv/mov_scaling'
  assert scaling[name].shape == (3, 2, 5)
  name = 'encoder/layers_0/mlp/intermediate_conv/mov_scaling'
  assert scaling[name].shape == (2, 13)


def test_arrays_by_name_read_like_a_checkpoint(adapter):
  loaded = t5x.from_arrays(released_arrays(CONFIG, adapter))
  assert loaded.config == CONFIG
  assert_equal_trees(loaded.adapter.tree, adapter.tree)


def test_top_k_is_said_in_the_method():
  arrays = released_arrays(CONFIG, ADAPTERS['mov'])
  method = t5x.from_arrays(arrays, top_k=2).adapter.method
  assert 'router=topk(k=2, renormalize=False)' in method


def test_ungated_gates_are_called_wi():
  config = CONFIGS['plain-tied']
  sites = [site for site in low_rank_sites('wi') if 'mlp' in site]
  tree = adapter_tree(config, LOW_RANK, sites)
  method = "lora(rank=7, alpha=16, targets='*/mlp/wi|*/mlp/wo')"
  arrays = released_arrays(config, AdapterWeights(method, tree))
  assert 'encoder/layers_0/mlp/lora_intermediate_conv/lora_A' in arrays
  loaded = t5x.from_arrays(arrays)
  assert loaded.adapter.method == method
  assert_equal_trees(loaded.adapter.tree, tree)


def test_two_methods_in_one_checkpoint_compose():
  lora, ia3 = ADAPTERS['lora'], ADAPTERS['ia3']
  both = weight_mapping.flatten(lora.tree) | weight_mapping.flatten(ia3.tree)
  adapter = AdapterWeights(
    f'{lora.method} + {ia3.method}', weight_mapping.unflatten(both)
  )
  loaded = t5x.from_arrays(released_arrays(CONFIG, adapter))
  assert loaded.adapter.method == adapter.method
  assert_equal_trees(loaded.adapter.tree, adapter.tree)


def test_a_lost_adapter_array_is_listed():
  arrays = released_arrays(CONFIG, ADAPTERS['molora'])
  lost = 'encoder/layers_1/attention/lora_v_conv/lora_B'
  del arrays[lost]
  with pytest.raises(CheckpointError) as error:
    t5x.from_arrays(arrays)
  assert f'- {lost} [2, 7, 15]' in str(error.value)


def test_a_foreign_array_is_listed():
  arrays = released_arrays(CONFIG) | {'decoder/extra': np.ones((2, 3))}
  with pytest.raises(CheckpointError, match=r'\+ decoder/extra \[2, 3\]'):
    t5x.from_arrays(arrays)


@pytest.mark.parametrize(
  ('method', 'what'),
  [
    ('lora(rank=7, alpha=8)', 'alpha=8'),
    ('lora(rank=7, rslora=True)', 'rslora'),
    ("mov(experts=2, reads='output')", "reads='output'"),
    ('molora(router=topk(k=1, renormalize=True))', 'topk'),
    ("ia3(on='input')", "on='input'"),
    ('prefix(length=3)', 'prefix'),
  ],
)
def test_what_the_released_code_does_not_know_is_refused(method, what):
  with pytest.raises(CheckpointError) as error:
    released_arrays(CONFIG, AdapterWeights(method, {}))
  assert what in str(error.value)


def test_sites_of_no_released_module_are_refused():
  tree = adapter_tree(CONFIG, LOW_RANK, ['encoder/mlp/wi_1'])
  with pytest.raises(CheckpointError, match='no lora at encoder/mlp/wi_1'):
    released_arrays(CONFIG, AdapterWeights('lora(rank=7)', tree))


def test_a_config_that_t5x_cannot_imply_is_refused(tmp_path):
  config = dataclasses.replace(CONFIG, scale_head=True)
  with pytest.raises(CheckpointError, match='have no config'):
    t5x.save(tmp_path / 'x', config, random_params(config))


def test_arrays_inside_of_the_index_are_read(tmp_path, monkeypatch):
  # 40 bytes: every matrix is stored in several pieces.
  monkeypatch.setattr(flax.serialization, 'MAX_CHUNK_SIZE', 40)
  target = weight_mapping.unflatten(released_arrays(CONFIG))
  packed = flax.serialization.msgpack_serialize(
    {'version': 3, 'optimizer': {'target': target}}
  )
  assert b'__msgpack_chunked_array__' in packed
  (tmp_path / 'checkpoint_1').mkdir()
  (tmp_path / 'checkpoint_1' / 'checkpoint').write_bytes(packed)
  loaded = t5x.load(str(tmp_path))
  assert_equal_trees(loaded.params, random_params(CONFIG))


def test_the_latest_checkpoint_of_a_parent_is_read(tmp_path):
  for step in (9, 10):
    params = random_params(CONFIG, seed=step)
    t5x.save(tmp_path / f'{step}', CONFIG, params, step=step)
    shutil.copytree(tmp_path / f'{step}', tmp_path / 'x', dirs_exist_ok=True)
  (tmp_path / 'x' / 'checkpoint_11.tmp-1').mkdir()
  loaded = t5x.load(str(tmp_path / 'x'))
  assert loaded.path.endswith('checkpoint_10')
  assert_equal_trees(loaded.params, random_params(CONFIG, seed=10))


@pytest.mark.parametrize('kept', [0, 1, 50, 5000])
def test_a_truncated_index_is_one_sentence(tmp_path, kept):
  t5x.save(tmp_path / 'x', CONFIG, random_params(CONFIG))
  index = tmp_path / 'x' / 'checkpoint_1' / 'checkpoint'
  index.write_bytes(index.read_bytes()[:kept])
  with pytest.raises(CheckpointError) as error:
    t5x.load(str(tmp_path / 'x'))
  assert '\n' not in str(error.value)


def test_no_checkpoint_is_one_sentence(tmp_path):
  with pytest.raises(CheckpointError, match='no T5X checkpoint'):
    t5x.load(str(tmp_path))
