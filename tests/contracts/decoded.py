# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens and gradients of a decoder on layouts of eight devices, and
where its weights lie.

Run as a command, because a process has as many devices as it begins with.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.core import sharding
from moepeft.models import weight_mapping
from moepeft.models.decoder import model as decoder
from moepeft.models.decoder.model import Decoder, DecoderConfig
from moepeft.nn import initializers
from moepeft.objectives import seq2seq
from moepeft.peft import build
from moepeft.training import state_sharding

CONFIG = DecoderConfig(
  vocab=40, d_model=16, heads=8, kv_heads=4, head_dim=6, ffn=24, layers=3
)
METHOD = 'molora(experts=3, rank=2, router=topk(k=2))'
LAYOUTS = {
  'one': dict(devices=slice(1)),
  'dp': dict(),
  'fsdp': dict(preset='fsdp'),
  'tp': dict(preset='tp', model=4),
  # More devices than heads of keys and values.
  'tp8': dict(preset='tp', model=8),
}
KEYS = 'decoder/layers/self/k/kernel'
ROWS, PROMPT, NEW = 8, 7, 5


def batch():
  rng = np.random.default_rng(0)
  lengths = np.arange(ROWS)[:, None] % PROMPT + 1
  ids = rng.integers(2, 40, (ROWS, PROMPT)).astype(np.int32)
  return {'inputs': ids, 'inputs_mask': np.arange(PROMPT) < lengths}


def placed(options):
  """(layout, model, variables as they lie) of a layout's options."""
  options = dict(options)
  devices = jax.devices()[options.pop('devices', slice(None))]
  layout = sharding.layout(**options, devices=devices)
  model = Decoder(CONFIG, build(METHOD, decoder.sites(CONFIG)).adapter_map)
  small = {'inputs': jnp.zeros((1, 2), jnp.int32)}
  variables = jax.tree.map(
    lambda a: np.asarray(3 * a), initializers.init_params(model, small, 1)
  )
  letters = initializers.logical_axes(model, small)
  letters = {key: letters[key] for key in variables}
  where = state_sharding.tree_shardings(layout, letters, variables)
  return layout, model, sharding.put(variables, where)


def tokens(layout, model, variables):
  """Greedy tokens [b, t] of whole calls."""
  row = np.arange(ROWS)
  lengths = np.sum(batch()['inputs_mask'], axis=1)
  ids = np.pad(batch()['inputs'], ((0, 0), (0, NEW)))
  apply = jax.jit(model.apply)
  answers = []
  for at in range(NEW):
    mask = np.arange(ids.shape[1]) < lengths[:, None] + at
    inputs = {'inputs': ids, 'inputs_mask': mask}
    inputs = sharding.shard_whole_batch(layout.mesh, inputs)
    logits = np.asarray(apply(variables, inputs))
    answers.append(logits[row, lengths + at - 1].argmax(-1))
    ids[row, lengths + at] = answers[-1]
  return np.stack(answers, axis=1).tolist()


def gradients(layout, model, variables):
  """{path: host array} of a step's loss and of all its gradients."""
  rows = batch()
  rows |= {'targets': np.roll(rows['inputs'], -1, axis=1)}
  rows |= {'targets_mask': rows['inputs_mask']}
  rows = sharding.shard_whole_batch(layout.mesh, rows)

  def loss(variables, rows):
    return seq2seq.loss_sums(model.apply, variables, rows, None)[0]

  value, actual = jax.jit(jax.value_and_grad(loss))(variables, rows)
  actual = {'loss': value, **weight_mapping.flatten(actual)}
  return {path: np.asarray(leaf) for path, leaf in actual.items()}


def main(path: str) -> None:
  actual, exact = {}, None
  for name, options in LAYOUTS.items():
    at = placed(options)
    own = gradients(*at)
    exact = exact or own
    off = {
      path: float(np.linalg.norm(own[path] - a) / (np.linalg.norm(a) or 1))
      for path, a in exact.items()
    }
    keys = weight_mapping.flatten(at[2]['params'])[KEYS]
    stored = keys.addressable_shards[0].data.size / keys.size
    actual[name] = (tokens(*at), off, stored)
  with open(path, 'w') as f:
    json.dump({'devices': jax.device_count(), **actual}, f)


if __name__ == '__main__':
  main(sys.argv[1])
