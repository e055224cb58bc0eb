# SPDX-License-Identifier: Apache-2.0
"""T5X checkpoints whose arrays lie in zarr directories."""

import shutil

import flax.serialization
import pytest
import tensorstore

from moepeft.checkpoints.t5x import model as t5x
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError

from ..cases import CONFIGS, assert_equal_trees, random_params, released_arrays

CONFIG = CONFIGS['gated-untied']


@pytest.fixture
def zarr(tmp_path):
  """A checkpoint whose arrays lie in zarr directories, two chunks each."""
  target = {}
  for name, array in released_arrays(CONFIG).items():
    folder = 'target.' + name.replace('/', '.')
    metadata = {
      'chunks': [-(-size // 2) for size in array.shape],
      'compressor': {'id': 'gzip', 'level': 1},
      'shape': list(array.shape),
      'dtype': '<f4',
    }
    store = {'driver': 'file', 'path': str(tmp_path / 'checkpoint_5' / folder)}
    spec = {'driver': 'zarr', 'kvstore': store, 'metadata': metadata}
    tensorstore.open(spec, create=True).result().write(array).result()
    # As T5X leaves it after a copy from a bucket.
    spec['kvstore'] = {'driver': 'file', 'path': f'bucket/old/{folder}/'}
    target[name] = spec
  tree = {
    'version': 3,
    'optimizer': {'target': weight_mapping.unflatten(target)},
  }
  packed = flax.serialization.msgpack_serialize(tree)
  (tmp_path / 'checkpoint_5' / 'checkpoint').write_bytes(packed)
  return tmp_path / 'checkpoint_5'


def test_zarr_arrays_are_read(zarr):
  loaded = t5x.load(str(zarr))
  assert loaded.config == CONFIG
  assert_equal_trees(loaded.params, random_params(CONFIG))


def test_a_lost_chunk_is_an_error_and_no_zeros(zarr):
  (zarr / 'target.token_embedder.embedding' / '1.0').unlink()
  with pytest.raises(CheckpointError, match=r'embedding/1.0 is missing'):
    t5x.load(str(zarr))


def test_a_lost_array_is_named(zarr):
  shutil.rmtree(zarr / 'target.encoder.encoder_norm.scale')
  with pytest.raises(CheckpointError, match='encoder_norm.scale'):
    t5x.load(str(zarr))


@pytest.mark.parametrize('damage', ['truncate', 'flip'])
def test_a_damaged_chunk_is_one_sentence(zarr, damage):
  chunk = zarr / 'target.token_embedder.embedding' / '0.1'
  data = bytearray(chunk.read_bytes())
  if damage == 'truncate':
    del data[len(data) // 2 :]
  else:
    data[len(data) // 2] ^= 1
  chunk.write_bytes(data)
  with pytest.raises(CheckpointError, match='truncated or damaged') as error:
    t5x.load(str(zarr))
  assert '\n' not in str(error.value)
