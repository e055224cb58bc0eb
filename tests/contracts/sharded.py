# SPDX-License-Identifier: Apache-2.0
"""One training step on layouts of eight devices, and what became of it.

Run as a command, because a process has as many devices as it begins with.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moepeft import config as config_lib
from moepeft.checkpoints.manager import Checkpoints
from moepeft.core import sharding
from moepeft.core.types import State
from moepeft.models import weight_mapping
from moepeft.nn import initializers
from moepeft.training import setup, state_sharding

from . import small

# Sizes that eight (v, d, f) or four (n) devices share, and some that not.
CONFIG = dataclasses.replace(
  small.GATED,
  vocab=40,
  d_model=16,
  heads=4,
  head_dim=6,
  ffn=24,
  dropout=0.0,
)
# One program of both mixtures: compiling is what takes long here.
MIXTURE = (
  "molora(experts=3, rank=2, targets='*/self/q|*/cross/o|*/wo')"
  " + mov(experts=3, targets='*/self/k|*/act')"
)
LAYOUTS = {
  'one': dict(devices=slice(1)),
  'dp': dict(),
  'fsdp': dict(preset='fsdp'),
  'tp2': dict(preset='tp', model=2),
  'tp4': dict(preset='tp', model=4),
  # Both mesh axes in one array.
  'both': dict(preset='tp', model=2, rules=(('embed', 'data'),)),
}
CASES = (
  *((MIXTURE, name) for name in ('one', 'fsdp', 'both')),
  *(('full', name) for name in ('one', 'fsdp', 'tp2', 'tp4')),
)
DESCRIBED = {
  'method': '',
  'semantics': 'official',
  'trainable': 'params',
  'seed': 0,
  'model': {},
  'base': {'path': '', 'sha256': ''},
}
# Its state after a step is the gradient itself.
OPTIMIZER = optax.chain(optax.trace(0.0), optax.scale(-0.1))


def layout_of(options) -> sharding.Layout:
  options = dict(options)
  devices = jax.devices()[options.pop('devices', slice(8))]
  return sharding.layout(**options, devices=devices)


def begin(method, layout):
  """(update, state, where, letters, built) before the first step."""
  config = config_lib.default()
  config.router_losses.load_balance = 0.1
  model, built = small.make(method, CONFIG)
  # Host arrays, which no step can take over.
  variables = jax.tree.map(
    np.asarray, small.variables(method, CONFIG, noise=0.1)
  )
  trainable = variables.pop(built.trainable)
  state = State(
    step=jnp.int32(0),
    trainable=trainable,
    frozen=next(iter(variables.values())),
    opt=jax.eval_shape(OPTIMIZER.init, trainable),
    rng=jax.random.key(3),
  )
  letters = initializers.logical_axes(model, small.batch())
  where = state_sharding.state_shardings(
    layout, state, letters, built.trainable
  )
  said = state_sharding.describe(layout, state, letters, built.trainable)
  update = jax.jit(
    setup.build_train_step(config, model, built, OPTIMIZER),
    donate_argnums=0,
    out_shardings=(where, layout.replicated),
  )
  return update, state_sharding.place(state, where, OPTIMIZER.init), said


def held(tree) -> list[float]:
  """The greatest share of each array that a device holds, by path."""
  return {
    path: max(shard.data.size for shard in leaf.addressable_shards) / leaf.size
    for path, leaf in weight_mapping.flatten(tree).items()
  }


def step(method, options, arrays, facts) -> State:
  layout = layout_of(options)
  update, state, said = begin(method, layout)
  before = jax.tree.map(lambda a: a.sharding, state)
  given = state
  batch = small.batch(rows=8, vocab=40)
  state, aux = update(state, sharding.shard_batch(layout.mesh, batch))
  same = jax.tree.map(
    lambda at, a: at.is_equivalent_to(a.sharding, a.ndim), before, state
  )
  facts |= {
    'said': said,
    'same': all(jax.tree.leaves(same)),
    'given': all(a.is_deleted() for a in jax.tree.leaves(given.trainable)),
    'trainable': held(state.trainable),
    'frozen': held(state.frozen),
    'gradient': held(state.opt[0].trace),
  }
  arrays['loss'] = np.asarray(aux['loss'])
  for path, leaf in weight_mapping.flatten(state.opt[0].trace).items():
    arrays[f'gradient/{path}'] = np.asarray(leaf)
  for path, leaf in weight_mapping.flatten(state.trainable).items():
    arrays[f'trainable/{path}'] = np.asarray(leaf)
  return state


def move(states, workdir) -> dict[str, bool]:
  """Whether what one layout saves comes back to another, spread as its own."""
  actual = {}
  for source, target in (('fsdp', 'one'), ('one', 'tp2'), ('tp2', 'fsdp')):
    path = f'{workdir}/{source}'
    Checkpoints(path, 1).save(states[source], DESCRIBED)
    blank = begin('full', layout_of(LAYOUTS[target]))[1]
    back = Checkpoints(path, 1).restore(blank, DESCRIBED)
    pairs = zip(
      jax.tree.leaves((back.trainable, back.opt, back.step)),
      jax.tree.leaves(
        (states[source].trainable, states[source].opt, states[source].step)
      ),
      jax.tree.leaves((blank.trainable, blank.opt, blank.step)),
      strict=True,
    )
    actual[f'{source} to {target}'] = all(
      np.array_equal(one, two) and one.sharding.is_equivalent_to(at, one.ndim)
      for one, two, at in ((a, b, c.sharding) for a, b, c in pairs)
    )
  return actual


def main(path: str, workdir: str) -> None:
  actual, facts, full = {}, {'devices': jax.device_count()}, {}
  for method, name in CASES:
    arrays, fact = {}, {}
    state = step(method, LAYOUTS[name], arrays, fact)
    if method == 'full':
      full[name] = state
    facts[f'{method}|{name}'] = fact
    actual |= {f'{method}|{name}|{key}': a for key, a in arrays.items()}
  facts['moved'] = move(full, workdir)
  try:
    sharding.shard_batch(sharding.make_mesh(2), small.batch(rows=7))
  except ValueError as e:
    facts['refused'] = str(e)
  np.savez(path, **actual)
  with open(f'{path}.json', 'w') as f:
    json.dump(facts, f)


if __name__ == '__main__':
  main(*sys.argv[1:])
