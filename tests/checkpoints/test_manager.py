# SPDX-License-Identifier: Apache-2.0
"""A checkpoint goes with its run and base only, and is what was written."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft import config as config_lib
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.manager import Checkpoints
from moepeft.checkpoints.restore import restore_adapter
from moepeft.checkpoints.run_metadata import describe_run, metadata_hash
from moepeft.core.types import State
from moepeft.inference.loaded_model import open_run
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params

from ..contracts import small

DESCRIBED = {
  'method': 'lora(rank=2)',
  'semantics': 'official',
  'trainable': 'peft',
  'seed': 3,
  'model': {'family': 't5', 'config': {'d_model': 11}},
  'base': {'path': '/base', 'sha256': 'aa'},
}


def make_state(trainable=None, step=7):
  if trainable is None:
    values = jnp.arange(15, dtype=jnp.float32).reshape(3, 5)
    trainable = {'q': {'a': values, 'b': 2 * values}}
  optimizer = optax.adam(0.1)
  # After an update, so that its means are not all zeros.
  _, opt = optimizer.update(trainable, optimizer.init(trainable), trainable)
  return State(
    step=jnp.int32(step),
    trainable=trainable,
    frozen={},
    opt=opt,
    rng=jax.random.key(step),
  )


@pytest.fixture
def kept(tmp_path):
  """Checkpoints with one in it."""
  checkpoints = Checkpoints(str(tmp_path), keep=2)
  checkpoints.save(make_state(), DESCRIBED)
  return checkpoints


def blank():
  return make_state({'q': {'a': jnp.zeros((3, 5)), 'b': jnp.zeros((3, 5))}}, 0)


def test_all_of_a_state_comes_back(kept):
  actual, expected = kept.restore(blank(), DESCRIBED), make_state()
  assert int(actual.step) == 7
  assert (
    jax.random.key_data(actual.rng) == jax.random.key_data(expected.rng)
  ).all()
  for one, two in zip(
    jax.tree.leaves((actual.trainable, actual.opt)),
    jax.tree.leaves((expected.trainable, expected.opt)),
    strict=True,
  ):
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('method', 'lora(rank=3)'),
    ('semantics', 'paper'),
    ('trainable', 'params'),
    ('seed', 4),
    ('model', {'family': 't5', 'config': {'d_model': 13}}),
    ('base', {'path': '/base', 'sha256': 'ab'}),
  ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
  kept, key, value
):
  with pytest.raises(ValueError, match=f'another .*{key}') as refused:
    kept.restore(blank(), DESCRIBED | {key: value})
  assert len(str(refused.value).splitlines()) == 1


def change_card(path, change):
  """Edits the card of the latest checkpoint on disk."""
  cards = {f: f.read_text() for f in path.glob('checkpoints/*/card/*')}
  (file,) = (f for f, text in cards.items() if '"checksums"' in text)
  actual = json.loads(cards[file])
  change(actual['checksums'])
  # The card is whole, what it says of an array is not so.
  del actual['sha256']
  actual['sha256'] = metadata_hash(actual)
  file.write_text(json.dumps(actual))


@pytest.mark.parametrize('way', ['restore', 'restore_trainable', 'adapter'])
@pytest.mark.parametrize('absent', [False, True])
def test_an_array_that_differs_from_its_checksum_is_named(
  kept, tmp_path, way, absent
):
  def change(checksums):
    (name,) = (
      n for n in checksums if n.startswith('trainable') and n.endswith('b')
    )
    digest = checksums.pop(name)
    if not absent:
      # One letter of it, as one flipped bit of the array would change all.
      checksums[name] = digest[:-1] + ('0' if digest[-1] != '0' else '1')

  change_card(tmp_path, change)
  again = Checkpoints(str(tmp_path), keep=2)
  calls = {
    'restore': lambda: again.restore(blank(), DESCRIBED),
    'restore_trainable': again.restore_trainable,
    'adapter': lambda: restore_adapter(str(tmp_path)),
  }
  with pytest.raises(ValueError, match='damaged: .*q/b') as refused:
    calls[way]()
  assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
  """The last update of a run may leave them where no loss shows it."""
  values = np.ones((3, 5), np.float32)
  broken = values.copy()
  broken[1, 2] = value
  state = make_state({'q': {'a': values, 'b': broken}})
  Checkpoints(str(tmp_path), keep=2).save(state, DESCRIBED)
  with pytest.raises(
    ValueError, match='q/b in the checkpoint of step 7 .* 1 numbers of 15'
  ):
    restore_adapter(str(tmp_path))


@pytest.mark.parametrize('kind', ['pipe', 'deep'])
def test_metadata_that_orbax_cannot_open_is_one_sentence(kept, tmp_path, kind):
  del kept
  (file,) = tmp_path.glob('checkpoints/7/_CHECKPOINT_METADATA')
  file.unlink()
  if kind == 'pipe':
    os.mkfifo(file)
  else:
    file.write_text('[' * 100_000)
  with pytest.raises(ValueError, match='checkpoints/7 is damaged') as refused:
    restore_adapter(str(tmp_path))
  assert len(str(refused.value).splitlines()) == 1


@pytest.fixture
def run(tmp_path):
  """(work directory, base's directory) of a run, as training leaves it."""
  shape = dataclasses.replace(small.GATED, vocab=263)
  params = init_params(t5.T5(shape), small.batch(), 0)['params']
  hf.save(str(tmp_path / 'base'), shape, params)
  config = config_lib.default()
  config.model.path = str(tmp_path / 'base')
  config.method = "lora(rank=2, targets='decoder/cross/q')"
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  variables = base_lib.initialise(base, model, config.seed)
  described = describe_run(base, built, config.seed)
  workdir = tmp_path / 'run'
  Checkpoints(str(workdir), 2).save(make_state(variables['peft']), described)
  (workdir / 'config.json').write_text(config.to_json())
  return workdir, tmp_path / 'base'


def test_a_run_opens_with_its_base(run):
  workdir, base = run
  _, _, variables, _, step = open_run(str(workdir))
  assert step == 7
  expected = hf.load(str(base)).params
  for one, two in zip(
    jax.tree.leaves(variables['params']),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_array_equal(one, two)


def test_a_run_does_not_open_on_a_changed_base(run):
  workdir, base = run
  file = base / 'model.safetensors'
  data = bytearray(file.read_bytes())
  # The lowest bit of some weight's last byte but three, so still a number.
  data[-4] ^= 1
  file.write_bytes(data)
  with pytest.raises(ValueError, match='content hash') as refused:
    open_run(str(workdir))
  assert str(base) in str(refused.value)
  data[-4] ^= 1
  file.write_bytes(data)
  open_run(str(workdir))
