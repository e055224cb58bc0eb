# SPDX-License-Identifier: Apache-2.0
"""Adapters are read from wherever they lie, whole or not at all."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from moepeft.checkpoints import adapter
from moepeft.checkpoints.hf import peft
from moepeft.checkpoints.manager import Checkpoints
from moepeft.checkpoints.run_metadata import describe_run
from moepeft.core.types import State
from moepeft.inference.adapters.load import read_adapter
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.models import weight_mapping
from moepeft.models.decoder.model import DecoderConfig

from .. import banked

CONFIG = DecoderConfig(
  vocab=7, d_model=5, heads=3, kv_heads=1, head_dim=2, ffn=11, layers=2
)
METHOD = 'lora(rank=3)'


@pytest.fixture(scope='module')
def base():
  return banked.base_of(CONFIG)


def run(workdir, base, method, trainable=None):
  """What training leaves in a work directory: (built, tree)."""
  built, tree = banked.trained(base, method)
  tree = trainable or tree
  state = State(
    step=np.int32(3),
    trainable=tree,
    frozen={},
    opt=optax.sgd(0.1).init(tree),
    rng=jax.random.key(0),
  )
  Checkpoints(str(workdir), keep=None).save(
    state, describe_run(base, built, seed=0)
  )
  (workdir / 'config.json').write_text('{}')
  return built, tree


def assert_reads(path, base, tree):
  actual = read_adapter(str(path), base)
  flat = weight_mapping.flatten(tree)
  assert actual.arrays.keys() == flat.keys()
  for name, array in flat.items():
    np.testing.assert_array_equal(actual.arrays[name], array, err_msg=name)
  return actual


def test_a_run_and_its_export_are_one_content(base, tmp_path):
  _, tree = run(tmp_path / 'run', base, METHOD)
  banked.save(tmp_path / 'own', base, METHOD)
  trained = assert_reads(tmp_path / 'run', base, tree)
  exported = assert_reads(tmp_path / 'own', base, tree)
  assert trained.sha256 == exported.sha256
  assert exported.source == str(tmp_path / 'own')


def test_an_adapter_of_hugging_faces_peft_is_read(base, tmp_path):
  built, tree = banked.trained(base, METHOD)
  peft.save(
    str(tmp_path / 'peft'), CONFIG, adapter.AdapterWeights(built.method, tree)
  )
  actual = assert_reads(tmp_path / 'peft', base, tree)
  # Its sites are named in the file, ours are the default: one form.
  own = read_adapter(banked.save(tmp_path / 'own', base, METHOD)[0], base)
  assert actual.bucket.parts[0].kind == own.bucket.parts[0].kind


def test_semantics_come_with_the_adapter(base, tmp_path):
  official = read_adapter(banked.save(tmp_path / 'a', base, METHOD)[0], base)
  paper = read_adapter(
    banked.save(tmp_path / 'b', base, METHOD, semantics='paper')[0], base
  )
  # The released code leaves wi_1 alone.
  assert len(paper.arrays) == len(official.arrays) + 2
  assert paper.sha256 != official.sha256


def test_another_base_is_refused(base, tmp_path):
  path, _, _ = banked.save(tmp_path / 'a', base, METHOD)
  run(tmp_path / 'run', base, METHOD)
  other = dataclasses.replace(base, sha256='1' * 64)
  for place in (path, str(tmp_path / 'run')):
    with pytest.raises(ValueError, match='another base than'):
      read_adapter(place, other)
  fewer = dataclasses.replace(base, quantise='nf4')
  with pytest.raises(ValueError, match="'full', this one is kept in 'nf4'"):
    read_adapter(path, fewer)


def test_a_run_of_the_whole_model_is_refused_with_what_to_do(base, tmp_path):
  run(tmp_path / 'run', base, 'full', trainable=base.params)
  with pytest.raises(ValueError, match='moepeft.convert --workdir'):
    read_adapter(str(tmp_path / 'run'), base)


def test_what_is_damaged_or_not_there_is_an_error(base, tmp_path):
  path, _, _ = banked.save(tmp_path / 'a', base, METHOD)
  file = tmp_path / 'a' / adapter.ARRAYS
  data = bytearray(file.read_bytes())
  data[-3] ^= 1
  file.write_bytes(data)
  with pytest.raises(ValueError, match='damaged'):
    read_adapter(path, base)
  with pytest.raises(ValueError, match='none of the known formats'):
    (tmp_path / 'empty').mkdir()
    read_adapter(str(tmp_path / 'empty'), base)
  with pytest.raises(ValueError, match='no checkpoint'):
    (tmp_path / 'begun' / 'checkpoints').mkdir(parents=True)
    read_adapter(str(tmp_path / 'begun'), base)


def test_a_broken_adapter_leaves_what_was_loaded(base, tmp_path):
  good, _, tree = banked.save(tmp_path / 'good', base, METHOD)
  banks = AdapterPool(base, {'it': good}, slots=3)
  before = banks.loaded()
  tree['decoder']['layers']['self']['q']['lora']['b'][1, 0, 0] = np.nan
  _, actual = adapter.load(good)
  adapter.save(tmp_path / 'nan', tree, actual)
  with pytest.raises(ValueError, match='self/q/lora/b.*diverged'):
    banks.load('it', str(tmp_path / 'nan'))
  del tree['decoder']['layers']['self']['q']
  adapter.save(tmp_path / 'less', tree, actual)
  with pytest.raises(ValueError, match='does not fit'):
    banks.load('it', str(tmp_path / 'less'))
  assert banks.loaded() == before
  assert banks.acquire('it').sha256 == before[0].sha256
