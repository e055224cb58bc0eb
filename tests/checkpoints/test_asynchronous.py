# SPDX-License-Identifier: Apache-2.0
"""Training goes on while a checkpoint is written, and is told if that fails."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.checkpoints.manager import Checkpoints
from moepeft.checkpoints.state_arrays import without_alias

from ..disks import full_disk  # noqa: F401
from .test_damage import equal, large, leaves
from .test_manager import DESCRIBED, make_state

VALUES = np.random.default_rng(1).standard_normal(3_000_000, np.float32)


def noise(step):
  """12 MB, of which a write takes a while."""
  # A copy: a step takes the buffer over.
  values = jnp.array(VALUES, copy=True)
  return make_state({'q': {'a': values, 'b': jnp.ones(3)}}, step)


@jax.jit
def doubled(tree):
  return jax.tree.map(lambda x: 2 * x, tree)


def test_what_is_written_is_the_state_at_the_save_whatever_follows(tmp_path):
  checkpoints = Checkpoints(str(tmp_path), keep=2, asynchronous=True)
  state = noise(3)
  expected = [np.array(leaf) for leaf in jax.tree.leaves(state.trainable)]
  checkpoints.save(state, DESCRIBED)
  # As a training step does: its buffers are taken over at once.
  step = jax.jit(lambda tree: doubled(tree), donate_argnums=0)
  tree = state.trainable
  for _ in range(20):
    old, tree = tree, step(tree)
  assert old['q']['a'].is_deleted()
  checkpoints.wait()
  restored = Checkpoints(str(tmp_path), keep=2).restore(noise(0), DESCRIBED)
  assert equal(
    restored.trainable,
    jax.tree.unflatten(jax.tree.structure(state.trainable), expected),
  )
  assert int(restored.step) == 3


def test_no_buffer_of_the_state_is_shared_with_the_writer():
  array = jnp.arange(64.0)
  copied = without_alias(array)
  np.testing.assert_array_equal(copied, array)
  assert copied.unsafe_buffer_pointer() != array.unsafe_buffer_pointer()
  assert copied.sharding == array.sharding
  # NumPy's own view of it does share: the copy is needed.
  view = np.asarray(array)
  assert view.ctypes.data == array.unsafe_buffer_pointer()


def test_a_second_save_waits_for_the_first(tmp_path):
  checkpoints = Checkpoints(str(tmp_path), keep=None, asynchronous=True)
  for step in (1, 2, 3):
    checkpoints.save(noise(step), DESCRIBED)
  checkpoints.wait()
  again = Checkpoints(str(tmp_path), keep=None)
  assert sorted(map(int, os.listdir(again.path))) == [1, 2, 3]
  assert int(again.restore(noise(0), DESCRIBED).step) == 3


@pytest.mark.parametrize('way', ['check', 'wait', 'save'])
def test_a_full_disk_that_a_thread_meets_is_raised_to_the_caller(
  full_disk,  # noqa: F811
  way,
  capfd,
):
  workdir = str(full_disk.path / 'w')
  checkpoints = Checkpoints(workdir, keep=2, asynchronous=True)
  checkpoints.save(large(3), DESCRIBED)
  checkpoints.wait()
  full_disk.fill(300_000)
  with pytest.raises(
    ValueError, match='is full; free some.*of step 3'
  ) as error:
    checkpoints.save(large(5), DESCRIBED)
    if way == 'check':
      # A training step each; the error comes with one of them.
      for _ in range(1000):
        checkpoints.check()
        time.sleep(0.05)
    elif way == 'wait':
      checkpoints.wait()
    else:
      checkpoints.save(large(7), DESCRIBED)
  assert len(str(error.value).splitlines()) == 1
  assert capfd.readouterr().err == ''
  assert os.listdir(checkpoints.path) == ['3']
  # Nothing is raised a second time, and there is a checkpoint to go on from.
  checkpoints.check()
  checkpoints.wait()
  full_disk.free()
  again = Checkpoints(workdir, keep=2)
  assert again.latest() == checkpoints.latest() == 3
  assert equal(leaves(again.restore(large(0), DESCRIBED)), leaves(large(3)))
