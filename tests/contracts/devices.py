# SPDX-License-Identifier: Apache-2.0
"""Three training steps on all devices of this process, saved to a file."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from moepeft import config as config_lib
from moepeft import optim, sharding, train
from moepeft.typing import State

from . import small

METHOD = 'molora(experts=3, rank=2, router=topk(k=2))'


def main(path: str) -> None:
  config = config_lib.default()
  config.router_losses.load_balance = 0.1
  model, built = small.make(METHOD)
  variables = small.variables(METHOD, noise=0.1)
  optimizer = optim.optimizer(config.optimizer, 10)
  mesh = sharding.make_mesh()
  state = State(
    step=jnp.int32(0),
    trainable=variables['peft'],
    frozen=variables['params'],
    opt=optimizer.init(variables['peft']),
    rng=jax.random.key(0),
  )
  state = sharding.replicate(mesh, state)
  update = jax.jit(train.make_update(model, built, config, optimizer))
  for seed in range(3):
    batch = sharding.shard_batch(mesh, small.batch(rows=8, seed=seed))
    state, aux = update(state, batch)
  leaves = [np.asarray(a) for a in jax.tree.leaves(state.trainable)]
  count = jax.device_count()
  np.savez(path, *leaves, loss=np.asarray(aux['loss']), n=count)


if __name__ == '__main__':
  main(sys.argv[1])
