# SPDX-License-Identifier: Apache-2.0
"""Three training steps of some methods on one device and on eight, saved.

Run as a command, because a process has as many devices as it begins with.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from moepeft import config as config_lib
from moepeft.core import sharding
from moepeft.core.types import State
from moepeft.models import weight_mapping
from moepeft.models.decoder.model import sites
from moepeft.moe import router_state
from moepeft.nn import initializers
from moepeft.peft import build
from moepeft.training import optimizers, setup, state_sharding

from . import router_probes, small, small_decoders


def made(family: str, method: str):
  """(model, built, variables) of a small T5 or decoder."""
  noise = 0.0 if method == 'full' else 0.1
  if family == 't5':
    return *small.make(method), small.variables(method, noise=noise)
  shape = small_decoders.CONFIGS[family]
  model, variables = small_decoders.make(shape, method, noise)
  return model, build(method, sites(shape)), variables


def batch_of(family: str, seed: int):
  """Eight rows."""
  batch = small.batch(rows=8, seed=seed)
  if family == 't5':
    return batch
  # A decoder is fed its own earlier targets.
  targets = {k: a for k, a in batch.items() if k.startswith('targets')}
  return targets | {'inputs': batch['decoder_inputs']}


def train_three(
  family: str, method: str, devices: list
) -> dict[str, np.ndarray]:
  """{path: trained array} and the last loss."""
  config = config_lib.default()
  config.router_losses.load_balance = 0.1
  model, built, variables = made(family, method)
  optimizer = optimizers.make_optimizer(config.optimizer, 10)
  init = router_state.optimizer_init(optimizer)
  layout = sharding.layout(devices=devices)
  # Host arrays, which lie on no device yet.
  variables = jax.tree.map(np.asarray, variables)
  trainable = variables.pop(built.trainable)
  state = State(
    step=jnp.int32(0),
    trainable=trainable,
    frozen=next(iter(variables.values())),
    opt=init(trainable),
    rng=jax.random.key(0),
  )
  letters = initializers.logical_axes(model, batch_of(family, 0))
  where = state_sharding.state_shardings(
    layout, state, letters, built.trainable
  )
  state = state_sharding.place(state, where, init)
  update = jax.jit(setup.build_train_step(config, model, built, optimizer))
  for seed in range(3):
    batch = sharding.shard_batch(layout.mesh, batch_of(family, seed))
    state, aux = update(state, batch)
  trained = weight_mapping.flatten(jax.tree.map(np.asarray, state.trainable))
  return trained | {'loss': np.asarray(aux['loss'])}


def main(path: str, family: str, *methods: str) -> None:
  arrays = {}
  with router_probes.registered():
    for count in (1, 8):
      devices = jax.devices()[:count]
      assert len(devices) == count
      for method in methods:
        trained = train_three(family, method, devices)
        arrays |= {f'{count}|{method}|{k}': v for k, v in trained.items()}
  np.savez(path, **arrays)


if __name__ == '__main__':
  main(*sys.argv[1:])
