# SPDX-License-Identifier: Apache-2.0
"""One row of benchmarks/device_table.py, in a process of its own.

A process that has run out of memory, or in which JAX holds all of it, is no
place for the next row. Takes the row as JSON, prints as its last line a JSON
object: {"seconds": of a step, the median; "bytes": the device's peak, null
where it does not tell}, or {"out_of_memory": true}; {"kind", "platform"} of
the device for the row {"side": "device"}.
"""

import importlib.util
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from moepeft import config as config_lib
from moepeft.checkpoints import base as base_lib
from moepeft.config import command_line
from moepeft.core import host_memory
from moepeft.core.types import State
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import METADATA
from moepeft.training import optimizers, setup

# Examples of a row of the batch, about as many as P3 packs.
_SEGMENTS = 4
# Where our `lora` acts, and its alpha.
_SITES, _ALPHA = ['q', 'k', 'v', 'o', 'wi_0', 'wo'], 16

Row = Mapping[str, Any]
Measurement = dict[str, Any]


def example(row: Row, vocab: int) -> dict[str, np.ndarray]:
  """A packed batch of random tokens, every one real."""
  rng = np.random.default_rng(0)
  batch = {}
  for side in ('inputs', 'targets'):
    shape = row['batch'], row[side]
    places = np.arange(row[side], dtype=np.int32) * _SEGMENTS // row[side]
    batch |= {
      side: rng.integers(2, vocab, shape, np.int32),
      f'{side}_mask': np.ones(shape, bool),
      f'{side}_segments': np.broadcast_to(places + 1, shape),
    }
  shifted = np.pad(batch['targets'][:, :-1], ((0, 0), (1, 0)))
  return batch | {'decoder_inputs': shifted}


def config_of(row: Row):
  """The default config at a row's size; bfloat16, no dropout.

  Weights that are trained are float32, and then by Adafactor as in the paper.
  """
  c = config_lib.default()
  full = row['method'] == 'full'
  c.method, c.batch_size = row['method'], row['batch']
  c.model.path, c.model.family, c.model.size = '', 't5', row['size']
  c.model.dropout, c.model.remat = 0.0, row['remat']
  c.model.dtype = 'bfloat16'
  c.model.param_dtype = 'float32' if full else 'bfloat16'
  c.optimizer.name = 'adafactor' if full else 'adamw'
  return c


def drawn(model: Any) -> dict[str, Any]:
  """{'params': ..., 'peft': ...}, drawn on the device."""
  key = jax.random.key(0)
  rngs = dict.fromkeys(('params', 'peft', METADATA), key)
  shapes = jax.eval_shape(lambda: model.init(rngs, base_lib.example_batch()))
  labels = flax.traverse_util.flatten_dict(shapes[METADATA])
  trees = {}
  for name in ('params', 'peft'):
    flat = flax.traverse_util.flatten_dict(shapes.get(name, {}))
    for path, leaf in flat.items():
      leaf_key = jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))
      make = jax.jit(labels[path].initializer, static_argnums=(1, 2))
      flat[path] = make(leaf_key, leaf.shape, leaf.dtype)
    trees[name] = flax.traverse_util.unflatten_dict(flat)
  return trees


def of_moepeft(row: Row) -> Measurement:
  """Times `moepeft.train`'s own update."""
  c = config_of(row)
  family, shape = base_lib.shape(c.model)
  base = base_lib.Base(family, shape, None, '', '')
  model, built = base_lib.module(base, c)
  optimizer = optimizers.make_optimizer(c.optimizer, c.steps)
  variables = drawn(model)
  trainable = variables.pop(built.trainable)
  state = State(
    step=jnp.int32(0),
    trainable=trainable,
    frozen=next(iter(variables.values())),
    opt=jax.jit(optimizer.init)(trainable),
    rng=jax.random.key(0),
  )
  del variables, trainable
  batch = jax.device_put(example(row, shape.vocab))
  update = jax.jit(
    setup.build_train_step(c, model, built, optimizer), donate_argnums=0
  )
  state_cell = [state]
  del state

  def step():
    state_cell[0], aux = update(state_cell[0], batch)
    jax.block_until_ready(aux)

  seconds = timed(step, row['steps'])
  memory_stats = jax.local_devices()[0].memory_stats() or {}
  return {'seconds': seconds, 'bytes': memory_stats.get('peak_bytes_in_use')}


def of_peft(row: Row) -> Measurement:
  """Times LoRA of Hugging Face's peft on transformers' T5, in torch."""
  import peft
  import torch
  import transformers

  shape = t5.config(row['size'])
  config = transformers.T5Config(
    vocab_size=shape.vocab,
    d_model=shape.d_model,
    d_kv=shape.head_dim,
    d_ff=shape.ffn,
    num_layers=shape.encoder_layers,
    num_decoder_layers=shape.decoder_layers,
    num_heads=shape.heads,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
    dropout_rate=0.0,
    use_cache=False,
    decoder_start_token_id=0,
  )
  device = torch.device('cpu' if row['platform'] == 'cpu' else 'cuda')
  torch.set_default_dtype(torch.bfloat16)
  with device:
    base = transformers.T5ForConditionalGeneration(config)
  if row['remat'] == 'full':
    base.gradient_checkpointing_enable({'use_reentrant': False})
  lora = peft.LoraConfig(
    r=row['rank'], lora_alpha=_ALPHA, target_modules=_SITES
  )
  model = peft.get_peft_model(base, lora).to(device)
  model.train()
  batch = example(row, shape.vocab)
  ids = {
    'input_ids': torch.tensor(batch['inputs'], device=device).long(),
    'attention_mask': torch.tensor(batch['inputs_mask'], device=device).long(),
    'labels': torch.tensor(batch['targets'], device=device).long(),
  }
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)

  def step():
    model(**ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if device.type == 'cuda':
      torch.cuda.synchronize()

  seconds = timed(step, row['steps'])
  cuda = device.type == 'cuda'
  peak = torch.cuda.max_memory_allocated() if cuda else None
  return {'seconds': seconds, 'bytes': peak}


def timed(step: Callable[[], None], steps: int) -> float:
  """The median seconds of a step, the first two aside."""
  times = []
  for _ in range(steps + 2):
    began = time.perf_counter()
    step()
    times.append(time.perf_counter() - began)
  return statistics.median(times[2:])


def why_no_peft(platform: str) -> str:
  """Why peft has no row beside ours on a platform; '' where it has."""
  for name in ('torch', 'peft', 'transformers'):
    if importlib.util.find_spec(name) is None:
      return f'{name} is not installed'
  if platform == 'cpu':
    return ''
  import torch

  return '' if torch.cuda.is_available() else 'torch sees no CUDA device'


def out_of_memory(error: Exception) -> bool:
  """Whether the device is full, as JAX and torch say it."""
  return (
    'RESOURCE_EXHAUSTED' in str(error)
    or type(error).__name__ == 'OutOfMemoryError'
  )


def measurement_of(row: Row) -> Measurement:
  """The measurements of one row; see the module's docstring."""
  if row['side'] == 'device':
    device = jax.devices()[0]
    return {'kind': device.device_kind, 'platform': device.platform}
  if row['side'] == 'why_no_peft':
    return {'why': why_no_peft(row['platform'])}
  side = {'moepeft': of_moepeft, 'peft': of_peft}[row['side']]
  try:
    return side(row)
  except Exception as e:
    if not out_of_memory(e):
      raise
    return {'out_of_memory': True}


if __name__ == '__main__':
  command_line.enable_compilation_cache()
  host_memory.tune_malloc()
  print(json.dumps(measurement_of(json.loads(sys.argv[1]))))
