# SPDX-License-Identifier: Apache-2.0
"""Overhead of the training loop over its jitted step, at T5-small size.

python benchmarks/loop.py [--json=FILE]

One process; both sides train the same adapter on the same base, from the same
pipeline. The bare side calls the compiled step on one batch that lies on the
device; the other is `moepeft.train.train` with rows, TensorBoard, progress and
a log line every other step. Saves are apart, as is compiling. Sides take turns
and medians are compared.
"""

import json
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from moepeft import config as config_lib
from moepeft import train
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.hf import model as hf
from moepeft.config import command_line
from moepeft.core import host_memory
from moepeft.core.types import State
from moepeft.data import load_tokenizer, make_loader, open_data
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params
from moepeft.runs.run import Run
from moepeft.training import optimizers, setup

_JSON = flags.DEFINE_string('json', None, 'Where to write the ratio.')
_STEPS = flags.DEFINE_integer('steps', 8, 'Steps timed on either side.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Turns of either side.')


def make_config(base: str):
  c = config_lib.default()
  c.model.path = base
  c.data.tokenizer = 'bytes'
  c.data.packing = True
  c.data.inputs_length, c.data.targets_length = 256, 64
  c.batch_size = 8
  # The first step is compiled in its time, so it is not counted.
  c.steps = _STEPS.value + 1
  c.evaluation.before = c.evaluation.after = False
  c.checkpoint.every_steps = 1 << 30
  c.log.every_steps = 2
  return c


def make_bare(config):
  """() -> seconds of a step, compiled before."""
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  variables = base_lib.initialise(base, model, config.seed)
  optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
  state = State(
    step=jnp.int32(0),
    trainable=variables['peft'],
    frozen=variables['params'],
    opt=optimizer.init(variables['peft']),
    rng=jax.random.key(0),
  )
  words = load_tokenizer(config.data.tokenizer, config.model.path)
  training_data = open_data(config.data, config.seed)
  batches = make_loader(
    training_data, words, config.data, config.batch_size, config.seed
  )
  batch = jax.device_put(next(batches))
  batches.close()
  update = jax.jit(
    setup.build_train_step(config, model, built, optimizer), donate_argnums=0
  )
  state_cell = [jax.block_until_ready(update(state, batch)[0])]

  def seconds() -> float:
    began = time.perf_counter()
    for _ in range(_STEPS.value):
      state_cell[0], _ = update(state_cell[0], batch)
    jax.block_until_ready(state_cell[0])
    return (time.perf_counter() - began) / _STEPS.value

  return seconds


def of_loop(config) -> float:
  """Seconds of a step of `train`, as its own rows say."""
  with tempfile.TemporaryDirectory() as workdir:
    train.train(config, workdir)
    rows = list(Run(workdir).metrics())
  speeds = [row['steps_per_s'] for row in rows if row.get('steps_per_s')]
  return 1 / statistics.median(speeds)


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  command_line.enable_compilation_cache()
  host_memory.tune_malloc()
  with tempfile.TemporaryDirectory() as folder:
    shape = t5.config('small')
    model = t5.T5(shape)
    hf.save(
      folder, shape, init_params(model, base_lib.example_batch(), 0)['params']
    )
    config = make_config(folder)
    bare = make_bare(config)
    sides = [(bare(), of_loop(config)) for _ in range(_ROUNDS.value)]
  alone, looped = (statistics.median(side) for side in zip(*sides, strict=True))
  report = {'time_loop_over_bare_step': round(looped / alone, 3)}
  print(json.dumps(report))
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(report, f)


if __name__ == '__main__':
  app.run(main)
