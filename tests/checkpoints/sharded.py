# SPDX-License-Identifier: Apache-2.0
"""Saves or restores a sharded state, and prints its checksums.

Run as a command, because a process has as many devices as it begins with.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moepeft.checkpoints import manager
from moepeft.checkpoints.checksums import checksums
from moepeft.core import sharding

from .test_manager import DESCRIBED, make_state


def refuse(*args):
  raise AssertionError('an array was gathered')


def state_of(values, scale, step, devices):
  mesh = Mesh(np.array(jax.devices()[:devices]), ('data',))
  split, whole = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
  tree = {'q': {'a': scale * values, 'b': scale * jnp.ones(5)}}
  state = make_state(tree, step)
  return jax.tree.map(
    lambda x: jax.device_put(x, split if x.shape == values.shape else whole),
    state,
  )


def main(count: str, action: str, workdir: str) -> None:
  sharding.gather = refuse
  assert len(jax.devices()) == int(count)
  values = jnp.arange(16 * 24, dtype=jnp.float32).reshape(16, 24) / 7
  checkpoints = manager.Checkpoints(workdir, keep=2)
  if action == 'save':
    state = state_of(values, 1.0, 7, int(count))
    checkpoints.save(state, DESCRIBED)
    print(json.dumps(checksums((state.trainable, state.opt))))
    return
  for devices in (1, int(count)):
    start = state_of(values, 0.0, 0, devices)
    state = checkpoints.restore(start, DESCRIBED)
    a, split = state.trainable['q']['a'], start.trainable['q']['a'].sharding
    assert a.sharding.is_equivalent_to(split, 2)
    assert len(a.addressable_shards) == devices
    np.testing.assert_array_equal(a, values)
    assert int(state.step) == 7
    print(json.dumps(checksums((state.trainable, state.opt))))


if __name__ == '__main__':
  main(*sys.argv[1:])
