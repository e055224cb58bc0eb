# SPDX-License-Identifier: Apache-2.0
"""No damage to a run's files is silent, and none takes what was whole."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft import train
from moepeft.checkpoints.manager import Checkpoints, DamagedCheckpoint
from moepeft.checkpoints.run_metadata import metadata_hash
from moepeft.runs.directory import LostWorkdir
from moepeft.runs.metrics_log import read
from moepeft.training import setup

from ..disks import full_disk  # noqa: F401
from ..training.test_train import adapter_bytes, base, card  # noqa: F401
from .test_manager import DESCRIBED, blank, make_state


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


# In the fast suite the largest file of each part, in the slow one every file.
@pytest.mark.parametrize(
  ('damage', 'every'),
  [
    pytest.param(damage, every, marks=pytest.mark.slow if every else ())
    for damage, every in (
      (flip, False),
      (cut, False),
      *((damage, True) for damage in (flip, remove, empty, cut)),
    )
  ],
)
def test_every_file_of_a_checkpoint_is_as_written_or_named(
  whole, tmp_path, damage, every
):
  before = whole / 'checkpoints' / '7'
  files = sorted(f for f in before.rglob('*') if f.is_file())
  if not every:
    parts = ('rest', 'trainable', 'card')
    files = [
      max(
        (f for f in files if part in f.relative_to(before).parts),
        key=lambda f: f.stat().st_size,
      )
      for part in parts
    ]
  files = [f.relative_to(whole) for f in files]
  expected = leaves(make_state())
  noticed = []
  for number, file in enumerate(files):
    workdir = tmp_path / str(number)
    shutil.copytree(whole, workdir)
    damage(workdir / file)
    try:
      actual = Checkpoints(str(workdir), keep=2).restore(blank(), DESCRIBED)
    except ValueError as e:
      # One line, that names the checkpoint and the one before.
      assert 'checkpoints/7' in str(e) and 'go on from step 5' in str(e), file
      assert len(str(e).splitlines()) == 1, file
      noticed.append(file)
    else:
      # What was damaged does not matter to the state.
      assert equal(leaves(actual), expected), file
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
  actual = Checkpoints(str(tmp_path / 'w'), 2).restore(blank(), DESCRIBED)
  assert equal(leaves(actual), leaves(make_state(step=5)))


@pytest.mark.parametrize('name', ['trainable', 'rest'])
def test_an_array_that_the_metadata_lost_is_named(whole, tmp_path, name):
  shutil.copytree(whole, tmp_path / 'w')
  path = tmp_path / 'w' / 'checkpoints' / '7' / name / '_METADATA'
  actual = json.loads(path.read_text())
  entry = next(key for key in actual['tree_metadata'] if "'b'" in key)
  del actual['tree_metadata'][entry]
  path.write_text(json.dumps(actual))
  checkpoints = Checkpoints(str(tmp_path / 'w'), keep=2)
  with pytest.raises(
    DamagedCheckpoint, match='7 is damaged.*go on from step 5'
  ):
    checkpoints.restore(blank(), DESCRIBED)
  if name == 'trainable':
    # Read without a state that says what should be there.
    with pytest.raises(DamagedCheckpoint, match='trainable/q/b is absent'):
      checkpoints.restore_trainable()


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('checksums', []),
    ('checksums', {'trainable/q/a': 3}),
    ('step', 'seven'),
    ('step', 2**70),
    ('course', None),
    ('course', {'place': [[0]], 'best': None, 'best_step': 0, 'waited': 0}),
    ('course', {'place': 3, 'best': None, 'best_step': 0, 'waited': 0}),
    ('base', 'aa'),
    ('method', None),
  ],
)
def test_a_sealed_card_of_wrong_types_is_damaged(whole, tmp_path, key, value):
  shutil.copytree(whole, tmp_path / 'w')
  path = tmp_path / 'w' / 'checkpoints' / '7' / 'card' / 'metadata'
  actual = json.loads(path.read_text()) | {key: value}
  path.write_text(json.dumps(actual | {'sha256': metadata_hash(actual)}))
  checkpoints = Checkpoints(str(tmp_path / 'w'), keep=2)
  for reading in (
    lambda: checkpoints.restore(blank(), DESCRIBED),
    checkpoints.restore_trainable,
    checkpoints.run_progress,
  ):
    with pytest.raises(DamagedCheckpoint, match=f'damaged.*{key}|place') as e:
      reading()
    assert len(str(e.value).splitlines()) == 1


def test_a_pipe_in_a_checkpoint_is_named_and_not_opened(whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'w')
  path = tmp_path / 'w' / 'checkpoints' / '7' / 'trainable' / '_METADATA'
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(DamagedCheckpoint, match='7 is damaged.*a named pipe'):
    Checkpoints(str(tmp_path / 'w'), keep=2).restore_trainable()


def test_a_damaged_checkpoint_is_skipped_and_stays_on_the_disk(
  whole, tmp_path, capsys
):
  for name in ('w/damaged/7', 'w/damaged/7.1'):
    (tmp_path / name).mkdir(parents=True)
  shutil.copytree(whole, tmp_path / 'w', dirs_exist_ok=True)
  damaged = tmp_path / 'w' / 'checkpoints' / '7'
  for data in damaged.rglob('d/*'):
    cut(data)
  before = {f.relative_to(damaged) for f in damaged.rglob('*')}
  checkpoints = Checkpoints(str(tmp_path / 'w'), keep=2)
  actual = checkpoints.restore(blank(), DESCRIBED, skip_damaged=True)
  assert equal(leaves(actual), leaves(make_state(step=5)))
  assert 'skipped: the checkpoint' in capsys.readouterr().err
  aside = tmp_path / 'w' / 'damaged' / '7.2'
  assert {f.relative_to(aside) for f in aside.rglob('*')} == before
  # The step is done again and saved in its place.
  checkpoints.save(make_state(), DESCRIBED)
  again = Checkpoints(str(tmp_path / 'w'), keep=2)
  assert equal(leaves(again.restore(blank(), DESCRIBED)), leaves(make_state()))


def test_the_last_whole_checkpoint_is_never_moved(whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'w')
  for name in ('5', '7'):
    cut(tmp_path / 'w' / 'checkpoints' / name / 'card' / 'metadata')
  with pytest.raises(DamagedCheckpoint, match='5 is damaged.*begin anew'):
    Checkpoints(str(tmp_path / 'w'), 2).restore(blank(), DESCRIBED, True)
  assert (tmp_path / 'w' / 'checkpoints' / '5').is_dir()
  assert (tmp_path / 'w' / 'damaged' / '7').is_dir()


def test_a_config_that_does_not_fit_is_no_damage(whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'w')
  state = blank()
  other = state.replace(opt=optax.sgd(0.1, 0.9).init(state.trainable))
  for opt in (other.opt, optax.adam(0.1).init({'q': jnp.zeros(7)})):
    checkpoints = Checkpoints(str(tmp_path / 'w'), 2)
    with pytest.raises(ValueError, match='is whole, but its arrays') as e:
      checkpoints.restore(state.replace(opt=opt), DESCRIBED, skip_damaged=True)
    assert not isinstance(e.value, DamagedCheckpoint)
  assert not (tmp_path / 'w' / 'damaged').exists()


def large(step):
  """Some 500 kB with Adam's moments, that no compression makes smaller."""
  noise = jax.random.normal(jax.random.key(0), (41_000,))
  return make_state({'q': {'a': noise, 'b': jnp.ones(3)}}, step)


@pytest.mark.parametrize('leave', [0, 20_000, 300_000])
def test_a_checkpoint_that_meets_a_full_disk_is_a_sentence(
  full_disk,  # noqa: F811
  leave,
  capfd,
):
  workdir = str(full_disk.path / 'w')
  checkpoints = Checkpoints(workdir, keep=2)
  checkpoints.save(large(3), DESCRIBED)
  full_disk.fill(leave)
  with pytest.raises(
    ValueError, match='is full; free some.*of step 3'
  ) as error:
    checkpoints.save(large(5), DESCRIBED)
  # No thread of the library says it again.
  assert capfd.readouterr().err == ''
  assert len(str(error.value).splitlines()) == 1
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_training_goes_on_from_the_checkpoint_before_if_asked_to(
  base,  # noqa: F811
  begun,
  tmp_path,
):
  workdir = tmp_path / 'w'
  shutil.copytree(begun, workdir)
  train.train(card(base), str(workdir))
  expected = adapter_bytes(workdir)
  for data in (workdir / 'checkpoints' / '4').rglob('d/*'):
    cut(data)
  with pytest.raises(ValueError, match='4 is damaged.*--skip_damaged.*step 2'):
    train.train(card(base), str(workdir))
  train.train(card(base), str(workdir), skip_damaged=True)
  rows = read(str(workdir / 'metrics.jsonl'))
  assert [row['step'] for row in rows] == [1, 2, 3, 4]
  assert adapter_bytes(workdir) == expected


@pytest.mark.slow
@pytest.mark.parametrize('step', [2, 3])
def test_a_run_whose_directory_is_moved_away_ends_and_makes_no_new_one(
  base,  # noqa: F811
  begun,
  tmp_path,
  monkeypatch,
  step,
):
  workdir, moved = tmp_path / 'w', tmp_path / 'moved'
  plain = setup.make_loader

  def opened(*args):
    batches = plain(*args)

    class Moving:
      position, seek, close = batches.position, batches.seek, batches.close

      def __next__(self):
        if batches.position()[1] and not moved.exists():
          workdir.rename(moved)
        return next(batches)

    return Moving()

  if step == 3:
    shutil.copytree(begun, workdir)
  monkeypatch.setattr(setup, 'make_loader', opened)
  ending = 'of step 2' if step == 3 else 'begins anew'
  with pytest.raises(LostWorkdir, match=f'moved.*{ending}'):
    train.train(card(base), str(workdir))
  assert not workdir.exists()
  # Put back, it goes on.
  monkeypatch.undo()
  moved.rename(workdir)
  train.train(card(base), str(workdir))
  assert Checkpoints(str(workdir), 2).latest() == 4
