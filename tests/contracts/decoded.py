# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of layouts of eight devices, and where their caches lie.

Run as a command, because a process has as many devices as it begins with.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from moepeft import placement, sharding
from moepeft.decoding import How, advance, start
from moepeft.models import decoder
from moepeft.models.decoder import Decoder, DecoderConfig
from moepeft.nn import start as start_lib
from moepeft.peft import build
from moepeft.sampling import Sampling

CONFIG = DecoderConfig(
  vocab=40, d_model=16, heads=8, kv_heads=4, head_dim=6, ffn=24, layers=3
)
METHOD = 'molora(experts=3, rank=2, router=topk(k=2))'
LAYOUTS = {
  'one': dict(devices=slice(1)),
  'dp': dict(),
  'fsdp': dict(preset='fsdp'),
  'tp': dict(preset='tp', model=4, rules=(('k', 'model'),)),
}
ROWS, PROMPT, NEW = 8, 7, 5


def batch():
  rng = np.random.default_rng(0)
  lengths = np.arange(ROWS)[:, None] % PROMPT + 1
  ids = rng.integers(2, 40, (ROWS, PROMPT)).astype(np.int32)
  return {'inputs': ids, 'inputs_mask': np.arange(PROMPT) < lengths}


def tokens(options):
  """(greedy tokens [b, t], specs of the cache) on a layout."""
  options = dict(options)
  devices = jax.devices()[options.pop('devices', slice(None))]
  layout = sharding.layout(**options, devices=devices)
  model = Decoder(CONFIG, build(METHOD, decoder.sites(CONFIG)).advice)
  small = {'inputs': jnp.zeros((1, 2), jnp.int32)}
  variables = jax.tree.map(
    lambda a: np.asarray(3 * a), start_lib.fresh(model, small, 1)
  )
  letters = start_lib.letters(model, small)
  letters = {key: letters[key] for key in variables}
  where = placement.tree_shardings(layout, letters, variables)
  variables = sharding.put(variables, where)
  how = How(Sampling(), jnp.array([-1]))
  rows = sharding.shard_whole_batch(layout.mesh, batch())
  begun = start(model, variables, rows, how, NEW)
  made = advance(model, variables, begun, how, NEW)
  specs = {
    tuple(leaf.sharding.spec) for leaf in jax.tree.leaves(made.memory.cache)
  }
  return np.asarray(made.tokens).tolist(), sorted(specs)


def main(path: str) -> None:
  found = {name: tokens(options) for name, options in LAYOUTS.items()}
  with open(path, 'w') as f:
    json.dump({'devices': jax.device_count(), **found}, f)


if __name__ == '__main__':
  main(sys.argv[1])
