# SPDX-License-Identifier: Apache-2.0
"""Adapters exported by version 0.1, with the logits that they gave then.

`python -m tests.checkpoints.exported_adapters` wrote tests/checkpoints/exported
with the code of that version. It is not run again: a later version has to load
these files. The base model is that of tests/invariants/bases.py.
"""

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from moepeft import config as config_lib
from moepeft.checkpoints import adapter, base
from moepeft.peft.prefix import placeholder_ids
from tests.invariants import bases

FOLDER = pathlib.Path(__file__).parent / 'exported'
LOGITS = FOLDER / 'logits.npz'
# {folder: (method, semantics, what the base's kernels are stored in)}
CASES = {
  'lora': ('lora(rank=3)', 'official', ''),
  'dora': ('dora(rank=3)', 'paper', ''),
  'ia3': ('ia3', 'official', ''),
  'mov': ('mov(experts=3)', 'official', ''),
  'mov_paper': ('mov(experts=3, router=topk(k=2))', 'paper', ''),
  'molora': ('molora(experts=3, rank=2)', 'official', ''),
  'molora_topk': (
    'molora(experts=3, rank=2, router=topk(k=2), dropout=0.1)',
    'official',
    '',
  ),
  'tokens': ("tokens(new='3|5-7')", 'official', ''),
  'prompt': ('prompt(length=2)', 'official', ''),
  'nested': (
    "lora(rank=2, targets='*/self/q|*/wo') + ia3(targets='*/q|*/act')",
    'official',
    '',
  ),
  'int8': ('lora(rank=1)', 'official', 'int8'),
}


def batch() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(1)
  inputs = rng.integers(2, bases.VOCAB, (2, 6))
  inputs[:, 1:3] = [3, 6]  # Ids that tokens(new='3|5-7') changes.
  inputs_mask = np.arange(6)[None] < [[6], [4]]
  return {
    'inputs': jnp.asarray(inputs * inputs_mask, jnp.int32),
    'inputs_mask': jnp.asarray(inputs_mask),
    'decoder_inputs': jnp.asarray(rng.integers(2, 30, (2, 4)), jnp.int32),
    'targets_mask': jnp.ones((2, 4), bool),
  }


def logits(model, variables, prompt_ids=()) -> np.ndarray:
  """The first 32 of each token's logits, the method's prompt in front."""
  inputs = batch()
  prefix = np.tile(np.asarray(prompt_ids, np.int32), (2, 1))
  inputs['inputs'] = jnp.concatenate([prefix, inputs['inputs']], axis=1)
  ones = np.ones(prefix.shape, bool)
  inputs['inputs_mask'] = jnp.concatenate([ones, inputs['inputs_mask']], 1)
  return np.asarray(jax.jit(model.apply)(variables, inputs)[..., :32])


def main() -> None:
  computed = {}
  with tempfile.TemporaryDirectory() as folder:
    path = bases.write(pathlib.Path(folder))['t5']
    for name, (method, semantics, quantise) in CASES.items():
      config = config_lib.default()
      config.model.path, config.model.quantize = path, quantise
      config.method, config.semantics = method, semantics
      frozen = base.load(config.model)
      model, built = base.module(frozen, config)
      variables = base.initialise(frozen, model, 0)
      rng = np.random.default_rng(len(computed))
      variables['peft'] = jax.tree.map(
        lambda a, rng=rng: (
          np.asarray(a) + 0.1 * rng.standard_normal(a.shape)
        ).astype(np.float32),
        variables['peft'],
      )
      prompt_ids = placeholder_ids(built.adapter_map, frozen.config.vocab)
      computed[name] = logits(model, variables, prompt_ids)
      adapter.save(
        str(FOLDER / name),
        variables['peft'],
        adapter.describe(
          built.method,
          semantics,
          'models/t5',
          frozen.sha256,
          frozen.config.family,
          frozen.config,
          quantise,
        ),
      )
  np.savez_compressed(LOGITS, **computed)
  print(json.dumps({name: a.shape for name, a in computed.items()}))


if __name__ == '__main__':
  main()
