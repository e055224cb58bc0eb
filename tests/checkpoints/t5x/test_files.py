# SPDX-License-Identifier: Apache-2.0
"""The forms of T5X's checkpoints: its own, single files, Orbax's."""

import json
import os

import flax.serialization
import numpy as np
import pytest

from moepeft import convert
from moepeft.checkpoints import formats as checkpoint_formats
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.t5x import model as t5x
from moepeft.checkpoints.t5x import zarr
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError

from ..cases import CONFIGS, assert_equal_trees, random_params, released_arrays
from .test_model import ADAPTERS, OFFICIAL

CONFIG = CONFIGS['gated-untied']


def unpacked(folder):
  raw = (folder / 'checkpoint').read_bytes()
  return flax.serialization.msgpack_restore(raw)


def test_the_step_is_an_int32_array_and_no_state_is_empty(tmp_path):
  t5x.save(tmp_path / 'x', CONFIG, random_params(CONFIG), step=7)
  index = unpacked(tmp_path / 'x' / 'checkpoint_7')
  assert index.keys() == {'version', 'optimizer'} and index['version'] == 3
  assert index['optimizer'].keys() == {'target', 'state'}
  assert index['optimizer']['state'].keys() == {'step'}
  step = index['optimizer']['state']['step']
  assert isinstance(step, np.ndarray)
  assert (step.dtype, step.shape, step) == (np.int32, (), 7)


def test_no_checkpoint_has_the_step_zero(tmp_path):
  t5x.save(tmp_path / 'x', CONFIG, random_params(CONFIG))
  assert os.listdir(tmp_path / 'x') == ['checkpoint_1']
  for step in (0, -1, 2**31):
    with pytest.raises(ValueError, match='a step from 1'):
      t5x.save(tmp_path / 'y', CONFIG, random_params(CONFIG), step=step)


def test_convert_keeps_the_step_and_starts_at_one(tmp_path):
  hf.save(tmp_path / 'hf', CONFIG, random_params(CONFIG))
  to = '--to=t5x'
  first = [f'--input={tmp_path}/hf', f'--output={tmp_path}/a', to]
  assert convert.main(['convert', *first]) == 0
  assert os.listdir(tmp_path / 'a') == ['checkpoint_1']
  t5x.save(tmp_path / 'b', CONFIG, random_params(CONFIG), step=1_100_000)
  again = [f'--input={tmp_path}/b', f'--output={tmp_path}/c', to]
  assert convert.main(['convert', *again]) == 0
  assert os.listdir(tmp_path / 'c') == ['checkpoint_1100000']


@pytest.mark.parametrize('name', ['t5x_t5', 't5x_molora'])
def test_the_keys_are_those_of_t5xs_own_files(name):
  if not (OFFICIAL / name).exists():
    pytest.skip('the official checkpoints are not here')
  index = unpacked(OFFICIAL / name / 'checkpoint_1100000')
  assert {'version', 'optimizer'} == index.keys()
  assert {'target', 'state'} == index['optimizer'].keys()
  assert t5x.load(str(OFFICIAL / name)).step == 1_100_000


@pytest.fixture
def target():
  """Random parameters and an adapter's as T5X holds them."""
  return weight_mapping.unflatten(released_arrays(CONFIG, ADAPTERS['molora']))


def assert_read(path, step):
  loaded = t5x.load(str(path))
  assert checkpoint_formats.detect(str(path)) == 't5x'
  assert loaded.config == CONFIG == t5x.load_config(str(path))
  assert_equal_trees(loaded.params, random_params(CONFIG))
  assert_equal_trees(loaded.adapter.tree, ADAPTERS['molora'].tree)
  assert loaded.step == step


def test_a_single_file_is_read(tmp_path, target):
  step = np.asarray(9, np.int32)
  state = {'step': step, 'param_states': {'a': {'m': np.zeros(3)}}}
  tree = {'version': 3, 'optimizer': {'target': target, 'state': state}}
  file = tmp_path / 'checkpoint_9'
  file.write_bytes(flax.serialization.msgpack_serialize(tree))
  assert_read(file, 9)
  assert_read(tmp_path, 9)


def test_a_single_file_of_flaxs_train_state_is_read(tmp_path, target):
  tree = {'step': 5, 'params': {'params': target}, 'opt_state': {}}
  file = tmp_path / 'checkpoint_5'
  file.write_bytes(flax.serialization.msgpack_serialize(tree))
  assert_read(file, 5)


@pytest.mark.parametrize(
  ('zarr3', 'ocdbt'),
  [(False, True), (False, False), (True, True)]
  # Orbax itself takes most of a minute for its files.
  + [pytest.param(True, False, marks=pytest.mark.slow)],
)
def test_an_orbax_checkpoint_is_read(tmp_path, target, ocdbt, zarr3):
  import orbax.checkpoint as ocp

  tree = {'target': target, 'state': {'step': np.int32(3), 'param_states': {}}}
  folder = tmp_path / 'checkpoint_3' / 'state'
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder, tree)
  # The directory has the step, which here is an array of its own.
  for path in (folder, tmp_path / 'checkpoint_3', tmp_path):
    assert_read(path, 3)
  if not ocdbt and not zarr3:
    lost = folder / 'target.token_embedder.embedding' / '0.0'
    lost.unlink()
    with pytest.raises(CheckpointError, match='0.0 is missing'):
      t5x.load(str(tmp_path))


def test_an_orbax_index_of_placeholders_is_read(tmp_path, target):
  folder = tmp_path / 'checkpoint_3' / 'state'
  folder.mkdir(parents=True)
  flat = {}
  for name, array in weight_mapping.flatten(target).items():
    stored = f'target.{name.replace("/", ".")}'
    zarr.write(folder, stored, array)
    flat[name] = f'PLACEHOLDER://{stored}'
  tree = {'target': weight_mapping.unflatten(flat), 'state': {'step': 3}}
  packed = flax.serialization.msgpack_serialize(tree)
  (folder / 'checkpoint').write_bytes(packed)
  assert_read(tmp_path, 3)


@pytest.mark.parametrize('name', ['checkpoint', 'model.ckpt-9.index'])
def test_a_checkpoint_of_tensorflow_is_named(tmp_path, name):
  (tmp_path / name).write_text('model_checkpoint_path: "model.ckpt-9"\n')
  with pytest.raises(CheckpointError, match='a TensorFlow checkpoint'):
    form = checkpoint_formats.detect(str(tmp_path))
    checkpoint_formats.FORMATS[form].load(str(tmp_path))


LEAF = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': 'a/'}}


@pytest.mark.parametrize(
  'tree',
  [
    [1, 2],
    3,
    {},
    {'optimizer': 3},
    {'target': [1]},
    {'target': {'a': 'text'}},
    {'target': {3: {'b': 1}}},
    {'target': {'a': {'driver': 'zarr', 'kvstore': 3}}},
    {'target': {'a': {'driver': 'zarr', 'kvstore': {'path': 3}}}},
    {'target': {'a': {'driver': 'cast', 'base': [3]}}},
    {'target': {'a': LEAF}},
    {'target': {'token_embedder': {'embedding': np.zeros(())}}},
    {'params': {'params': 3}},
  ],
)
def test_odd_trees_are_one_sentence(tmp_path, tree):
  packed = flax.serialization.msgpack_serialize(tree)
  (tmp_path / 'checkpoint_3').write_bytes(packed)
  with pytest.raises(CheckpointError) as error:
    t5x.load(str(tmp_path))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'said',
  [
    {'tree_metadata': 3},
    {'tree_metadata': {'a': 3}},
    {'tree_metadata': {'a': {'key_metadata': [{'x': 1}]}}},
    {'tree_metadata': {'a': {'key_metadata': [{'key': 'target'}]}}},
    {
      'tree_metadata': {
        'a': {'key_metadata': [{'key': 'target'}, {'key': 'a'}]},
        'b': {'key_metadata': [{'key': 'target'}]},
      }
    },
  ],
)
def test_odd_metadata_of_orbax_are_one_sentence(tmp_path, said):
  (tmp_path / '_METADATA').write_text(json.dumps(said))
  with pytest.raises(CheckpointError) as error:
    t5x.load(str(tmp_path))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'changes',
  [
    {'shape': 3},
    {'shape': [2, 'x'], 'chunks': [2, 2]},
    {'shape': [2], 'chunks': [2, 2]},
    {'shape': [2, 2], 'chunks': [0, 2]},
    {'shape': [10**9, 3], 'chunks': [1, 3]},
    {'shape': [2**40, 3], 'chunks': [2**40, 3]},
    {'shape': [3, 3], 'chunks': [2**30, 2**12]},
    {'shape': [-1, 3]},
    {'dtype': 3},
    {'compressor': 'x'},
    {'dimension_separator': 3},
    {'dimension_separator': ''},
  ],
)
def test_odd_zarr_metadata_are_one_sentence(tmp_path, changes):
  zarr.write(tmp_path, 'a', np.ones((3, 3), np.float32))
  file = tmp_path / 'a' / '.zarray'
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(CheckpointError) as error:
    zarr.read(tmp_path / 'a', zarr.read_metadata(tmp_path / 'a'))
  assert '\n' not in str(error.value)
