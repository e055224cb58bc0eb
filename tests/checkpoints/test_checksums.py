# SPDX-License-Identifier: Apache-2.0
"""Checksums are of the global array, whatever the mesh, and find each bit."""

import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.checkpoints.checksums import checksums
from moepeft.checkpoints.manager import Checkpoints
from moepeft.checkpoints.run_metadata import metadata_hash

from .. import commands
from .test_manager import DESCRIBED, blank, make_state

M = 2**32


def by_hand(array, lane):
  """The definition of a lane's sum, element by element."""

  def mix(x):
    x ^= x >> 16
    x = x * 0x85EBCA6B % M
    x ^= x >> 13
    x = x * 0xC2B2AE35 % M
    return x ^ (x >> 16)

  bits = array.ravel().view(np.uint32).tolist()
  return sum(mix(b ^ mix((i + lane) % M)) for i, b in enumerate(bits)) % M


def test_a_checksum_is_the_wrapping_sum_of_mixed_bits_and_index():
  array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  lanes = (0x9E3779B9, 0x85EBCA6B)
  digits = ''.join(f'{by_hand(array, lane):08x}' for lane in lanes)
  assert checksums({'q': {'a': array}}) == {'q/a': f'float32[3,5] {digits}'}


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'float16', 'int32', 'int8', 'uint32', 'bool']
)
def test_every_flipped_bit_and_every_exchange_changes_a_checksum(dtype):
  rng = np.random.default_rng(1)
  array = np.asarray(jnp.asarray(rng.integers(0, 2, 7), dtype))
  size = array.dtype.itemsize
  seen = {checksums(array)['']}
  for place in range(7 * size):
    for bit in range(1 if dtype == 'bool' else 8):
      data = bytearray(array.tobytes())
      data[place] ^= 1 << bit
      flipped = np.frombuffer(bytes(data), array.dtype)
      seen.add(checksums(flipped)[''])
  assert len(seen) == 1 + 7 * (1 if dtype == 'bool' else 8 * size)
  # Two elements in each other's place.
  i, j = 0, int(np.flatnonzero(array != array[0])[0])
  moved = array.copy()
  moved[[i, j]] = moved[[j, i]]
  assert checksums(moved)[''] not in seen


def sharded(count, action, workdir):
  """[{path: checksum}] in a process of so many devices: of the state that it
  saves, or restores on one and on all of them."""
  flag = f'--xla_force_host_platform_device_count={count}'
  env = os.environ | {
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flag}',
    'JAX_PLATFORMS': 'cpu',
  }
  result = commands.run(
    'tests.checkpoints.sharded', count, action, workdir, env=env
  )
  assert result.returncode == 0, result.stderr
  return [json.loads(line) for line in result.stdout.splitlines()]


def test_eight_devices_save_and_one_and_four_restore(tmp_path):
  (saved,) = sharded(8, 'save', tmp_path)
  card = json.loads(
    next(tmp_path.glob('checkpoints/7/card/metadata')).read_text()
  )
  digests = card['checksums']
  assert digests['trainable/q/a'].startswith('float32[16,24] ')
  # Written in several files, as each device's part is its own.
  assert sharded(4, 'restore', tmp_path) == [saved, saved]
  # A process that knows nothing of the state reads the same.
  tree, _ = Checkpoints(str(tmp_path), 2).restore_trainable()
  expected = np.arange(16 * 24, dtype=np.float32).reshape(16, 24) / 7
  np.testing.assert_allclose(tree['q']['a'], expected, rtol=1e-6)


def test_each_of_forty_flipped_bits_of_the_arrays_is_found(tmp_path):
  workdir = tmp_path / 'w'
  rng = np.random.default_rng(2)
  noise = rng.normal(size=(64, 96)).astype(np.float32)
  Checkpoints(str(workdir), 2).save(
    make_state({'q': {'a': jnp.asarray(noise), 'b': jnp.ones(5)}}), DESCRIBED
  )
  files = sorted(
    (f for f in (workdir / 'checkpoints').rglob('d/*') if f.is_file()),
    key=lambda f: f.stat().st_size,
  )
  actual = 0
  for number in range(40):
    file = files[-1 - number % 2]
    data = bytearray(file.read_bytes())
    original = bytes(data)
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)
    try:
      state = Checkpoints(str(workdir), 2).restore(
        make_state({'q': {'a': 0 * jnp.asarray(noise), 'b': jnp.zeros(5)}}, 0),
        DESCRIBED,
      )
    except ValueError as error:
      assert 'damaged' in str(error)
      actual += 1
    else:
      # The bit was of no array.
      np.testing.assert_array_equal(state.trainable['q']['a'], noise)
    file.write_bytes(original)
  assert actual >= 38


def test_a_checkpoint_of_version_0_1_has_hashes_and_is_restored(tmp_path):
  workdir = tmp_path / 'w'
  Checkpoints(str(workdir), 2).save(make_state(), DESCRIBED)
  file = next(workdir.glob('checkpoints/7/card/metadata'))
  card = json.loads(file.read_text())
  del card['sha256'], card['checksums']
  state = make_state()
  mean, variance = state.opt[0].mu['q'], state.opt[0].nu['q']
  arrays = {
    'trainable/q/a': state.trainable['q']['a'],
    'trainable/q/b': state.trainable['q']['b'],
    'rest/opt/0/count': state.opt[0].count,
    'rest/opt/0/mu/q/a': mean['a'],
    'rest/opt/0/mu/q/b': mean['b'],
    'rest/opt/0/nu/q/a': variance['a'],
    'rest/opt/0/nu/q/b': variance['b'],
    'rest/step': state.step,
    'rest/rng': jax.random.key_data(state.rng),
  }
  card['hashes'] = {
    path: hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
    for path, array in arrays.items()
  }
  card['sha256'] = metadata_hash(card)
  file.write_text(json.dumps(card))
  restored = Checkpoints(str(workdir), 2).restore(blank(), DESCRIBED)
  np.testing.assert_array_equal(
    restored.trainable['q']['b'], state.trainable['q']['b']
  )
  broken = tmp_path / 'broken'
  shutil.copytree(workdir, broken)
  file = next(broken.glob('checkpoints/7/card/metadata'))
  card['hashes']['trainable/q/b'] = '0' * 64
  card['sha256'] = metadata_hash(card)
  file.write_text(json.dumps(card))
  with pytest.raises(ValueError, match='q/b differs from its checksum'):
    Checkpoints(str(broken), 2).restore(blank(), DESCRIBED)
