# SPDX-License-Identifier: Apache-2.0
"""Time of the default run's step without `host_memory.tune_malloc` and with.

python benchmarks/keep_pages.py [--json=FILE]

The setting must be made before a process starts its threads, so each side is
a process of its own; they take turns.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from moepeft.checkpoints import base as base_lib
from moepeft.config import command_line as config_command_line
from moepeft.core import host_memory
from moepeft.core.types import State
from moepeft.data import load_tokenizer, make_loader, open_data
from moepeft.training import optimizers, setup

_JSON = flags.DEFINE_string('json', None, 'Where to write the figures.')
_STEPS = flags.DEFINE_integer('steps', 40, 'Steps timed on either side.')
_ROUNDS = flags.DEFINE_integer('rounds', 2, 'Processes of either side.')
_SIDE = flags.DEFINE_enum(
  'side', None, ['without', 'with'], 'Measure one side and print it.'
)


def make_step(config):
  """The default run's jitted step, its state and a batch."""
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  variables = base_lib.initialise(base, model, config.seed)
  optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
  peft = variables['peft']
  state = State(
    step=jnp.int32(0),
    trainable=peft,
    frozen=variables['params'],
    opt=optimizer.init(peft),
    rng=jax.random.key(config.seed),
  )
  training_data = open_data(config.data, config.seed)
  words = load_tokenizer(config.data.tokenizer, config.model.path)
  batch = next(
    make_loader(
      training_data, words, config.data, config.batch_size, config.seed
    )
  )
  update = setup.build_train_step(config, model, built, optimizer)
  return jax.jit(update, donate_argnums=0), state, batch


def measure(steps):
  """Median seconds, system seconds and page faults of a step."""
  step, state, batch = make_step(_CONFIG.value)
  for _ in range(5):
    state, _ = step(state, batch)
  jax.block_until_ready(state)
  times, before = [], resource.getrusage(resource.RUSAGE_SELF)
  for _ in range(steps):
    start = time.perf_counter()
    state, _ = step(state, batch)
    jax.block_until_ready(state)
    times.append(time.perf_counter() - start)
  after = resource.getrusage(resource.RUSAGE_SELF)
  return {
    'time': statistics.median(times),
    'system': (after.ru_stime - before.ru_stime) / steps,
    'faults': (after.ru_minflt - before.ru_minflt) / steps,
  }


def run(side):
  """`measure` in a process of its own."""
  command_line = [sys.executable, *sys.argv, f'--side={side}']
  done = subprocess.run(command_line, check=True, stdout=subprocess.PIPE)
  return json.loads(done.stdout)


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  config_command_line.enable_compilation_cache()
  if _SIDE.value:
    if _SIDE.value == 'with' and not host_memory.tune_malloc():
      raise SystemExit('tune_malloc does nothing on this machine')
    print(json.dumps(measure(_STEPS.value)))
    return
  sides = {'without': [], 'with': []}
  for _ in range(_ROUNDS.value):
    for side, rounds in sides.items():
      rounds.append(run(side))
  mean = {
    side: {key: statistics.mean(r[key] for r in rounds) for key in rounds[0]}
    for side, rounds in sides.items()
  }
  # Few steps may take less system time than the kernel's tick.
  ratios = {
    f'{key}_without_over_with': (
      round(mean['without'][key] / value, 3) if value else None
    )
    for key, value in mean['with'].items()
  }
  print(json.dumps(ratios, indent=2))
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(ratios, f, indent=2)


if __name__ == '__main__':
  _CONFIG = config_command_line.define_config('configs/molora_t5.py')
  app.run(main, flags_parser=config_command_line.parse)
