# SPDX-License-Identifier: Apache-2.0
"""No damage to a run's files is silent, and none takes what was whole."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import train
from moepeft.checkpoint import Checkpoints
from moepeft.rows import read

from .disks import full_disk  # noqa: F401
from .test_checkpoint import DESCRIBED, blank, make_state
from .test_train import base, card  # noqa: F401


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Checkpoints of the steps 5 and 7; to be read only."""
  path = tmp_path_factory.mktemp('whole')
  checkpoints = Checkpoints(str(path), keep=2)
  checkpoints.save(make_state(step=5), DESCRIBED)
  checkpoints.save(make_state(), DESCRIBED)
  return path


def leaves(state):
  key = jax.random.key_data(state.rng)
  return jax.tree.leaves((state.trainable, state.opt, state.step, key))


def equal(one, two):
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
  return all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs)


def remove(file):
  file.unlink()


def empty(file):
  file.write_bytes(b'')


def cut(file):
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2])


def flip(file):
  data = bytearray(file.read_bytes())
  if data:
    data[len(data) // 3] ^= 1
  file.write_bytes(data)


@pytest.mark.parametrize('damage', [remove, empty, cut, flip])
def test_every_file_of_a_checkpoint_is_as_written_or_named(
  whole, tmp_path, damage
):
  before = whole / 'checkpoints' / '7'
  files = [
    f.relative_to(whole) for f in sorted(before.rglob('*')) if f.is_file()
  ]
  expected = leaves(make_state())
  noticed = []
  for number, file in enumerate(files):
    workdir = tmp_path / str(number)
    shutil.copytree(whole, workdir)
    damage(workdir / file)
    try:
      found = Checkpoints(str(workdir), keep=2).restore(blank(), DESCRIBED)
    except ValueError as e:
      # One line, that names the checkpoint and the one before.
      assert 'checkpoints/7' in str(e) and 'go on from step 5' in str(e), file
      assert len(str(e).splitlines()) == 1, file
      noticed.append(file)
    else:
      # What was damaged does not matter to the state.
      assert equal(leaves(found), expected), file
  # The arrays and the card do.
  for part in ('rest', 'trainable', 'card'):
    assert any(file.parts[2] == part for file in noticed), (part, noticed)


@pytest.mark.parametrize('part', ['card', 'rest', 'trainable'])
def test_a_missing_part_of_a_checkpoint_is_named(whole, tmp_path, part):
  shutil.copytree(whole, tmp_path / 'w')
  shutil.rmtree(tmp_path / 'w' / 'checkpoints' / '7' / part)
  checkpoints = Checkpoints(str(tmp_path / 'w'), keep=2)
  with pytest.raises(ValueError, match='checkpoints/7.*go on from step 5'):
    checkpoints.restore(blank(), DESCRIBED)


def test_doing_what_a_damage_says_goes_on_from_the_one_before(whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'w')
  folder = tmp_path / 'w' / 'checkpoints'
  shutil.rmtree(folder / '7' / 'card')
  shutil.move(folder / '7', tmp_path / 'away')
  found = Checkpoints(str(tmp_path / 'w'), 2).restore(blank(), DESCRIBED)
  assert equal(leaves(found), leaves(make_state(step=5)))


def large(step):
  """Some 500 kB with Adam's moments, that no compression makes smaller."""
  noise = jax.random.normal(jax.random.key(0), (41_000,))
  return make_state({'q': {'a': noise, 'b': jnp.ones(3)}}, step)


@pytest.mark.parametrize('leave', [0, 20_000, 300_000])
def test_a_checkpoint_that_meets_a_full_disk_is_a_sentence(
  full_disk,  # noqa: F811
  leave,
):
  workdir = str(full_disk.path / 'w')
  checkpoints = Checkpoints(workdir, keep=2)
  checkpoints.save(large(3), DESCRIBED)
  full_disk.fill(leave)
  with pytest.raises(ValueError, match='is full; free some.*of step 3') as told:
    checkpoints.save(large(5), DESCRIBED)
  assert len(str(told.value).splitlines()) == 1
  # Half a checkpoint is none, now and for the next process, and takes no room.
  assert checkpoints.latest() == Checkpoints(workdir, keep=2).latest() == 3
  assert os.listdir(checkpoints.path) == ['3']
  full_disk.free()
  again = Checkpoints(workdir, keep=2)
  again.save(large(5), DESCRIBED)
  assert equal(leaves(again.restore(large(0), DESCRIBED)), leaves(large(5)))


def test_a_first_checkpoint_that_does_not_fit_says_so(full_disk):  # noqa: F811
  checkpoints = Checkpoints(str(full_disk.path / 'w'), keep=2)
  full_disk.fill(100_000)
  with pytest.raises(ValueError, match='is full.*begins anew'):
    checkpoints.save(large(3), DESCRIBED)
  assert checkpoints.latest() is None


@pytest.fixture(scope='module')
def begun(base, tmp_path_factory):  # noqa: F811
  """A run that was stopped at step 2; to be copied."""
  workdir = tmp_path_factory.mktemp('begun')
  train.train(card(base, steps=2), str(workdir))
  return workdir


def test_training_that_filled_the_disk_goes_on_when_there_is_space(
  base,  # noqa: F811
  begun,
  full_disk,  # noqa: F811
):
  workdir = full_disk.path / 'w'
  shutil.copytree(begun, workdir)
  size = sum(f.stat().st_size for f in workdir.rglob('*') if f.is_file())
  # Enough for rows and figures, and not for the checkpoint of step 4.
  full_disk.fill(leave=size // 3)
  with pytest.raises(ValueError, match='is full; .* from the .* of step 2'):
    train.train(card(base), str(workdir))
  full_disk.free()
  train.train(card(base), str(workdir))
  rows = read(str(workdir / 'metrics.jsonl'))
  assert [row['step'] for row in rows] == [1, 2, 3, 4]
  assert Checkpoints(str(workdir), keep=2).latest() == 4


def test_training_refuses_a_cut_checkpoint_in_one_sentence(
  base,  # noqa: F811
  begun,
  tmp_path,
):
  shutil.copytree(begun, tmp_path / 'w')
  for data in (tmp_path / 'w' / 'checkpoints' / '2').rglob('d/*'):
    cut(data)
  with pytest.raises(ValueError, match='checkpoints/2.*begin anew') as refused:
    train.train(card(base), str(tmp_path / 'w'))
  assert len(str(refused.value).splitlines()) == 1
