# SPDX-License-Identifier: Apache-2.0
"""Trials trained together by one vmapped step, beside the same trials alone.

python benchmarks/vmap.py [--config=FILE] [--trials=4] [--json=FILE]
python benchmarks/vmap.py --sweep --trials=4 --config.steps=30

A step of a side is a step of every trial: one vmapped step, or one step after
the other of the program that a trial has alone. Sides take turns in one
process, and the ratio is the median over the rounds of a round's ratio; above
1, together is faster. FLOPs are the products of the traced steps; bytes, and
memory beside the arguments, are XLA's, and its count has a scan's body once.

--sweep runs moepeft.sweep over as many seeds without and with --vmap, each with
an empty compilation cache, and compares the seconds of CPU and of the clock.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import jax
from absl import flags
from ml_collections import ConfigDict

from moepeft import registries
from moepeft.checkpoints.count_flops import products
from moepeft.config import check as config_check
from moepeft.config import command_line, program
from moepeft.evaluation.step_cost import CompiledStep, take_turns
from moepeft.training import setup, vmapped


def configs(config: ConfigDict, count: int) -> list[ConfigDict]:
  """Trials that differ in the seed and the rate."""
  rate = config.optimizer.learning_rate
  changes = (
    {'seed': i, 'optimizer.learning_rate': rate / (i + 1)} for i in range(count)
  )
  return [program.with_numbers(config, values) for values in changes]


def steps(config: ConfigDict, count: int) -> dict[str, float]:
  """The ratios of so many trials alone over those together."""
  training = setup.build(config, '', dry_run=True)
  batches = [jax.device_put(next(training.batches)) for _ in range(count)]
  training.batches.close()
  state, trials = training.state, configs(config, count)
  shared = {'frozen': state.frozen, 'reference': state.reference}
  row = state.replace(**dict.fromkeys(shared, ()))
  single = vmapped.parametric(training.make_step, config)
  multiple = vmapped.vmapped(training.make_step, config)
  arguments = [({}, row, shared, batch) for batch in batches]
  of_all = (
    vmapped.differing_numbers(trials),
    vmapped.stack([row] * count),
    shared,
    vmapped.stack(batches),
  )
  alone = jax.jit(single).lower(*arguments[0]).compile()
  together = jax.jit(multiple).lower(*of_all).compile()
  sides = {
    'alone': CompiledStep(
      lambda: [jax.block_until_ready(alone(*a)) for a in arguments], None
    ),
    'together': CompiledStep(
      lambda: jax.block_until_ready(together(*of_all)), None
    ),
  }
  times = take_turns(sides, _ROUNDS.value)
  pairs = zip(times['alone'], times['together'], strict=True)
  flops = count * products(single, *arguments[0]) / products(multiple, *of_all)
  read = [x.cost_analysis()['bytes accessed'] for x in (alone, together)]
  memory = [
    x.memory_analysis().temp_size_in_bytes / 1e6 for x in (alone, together)
  ]
  return {
    'trials': count,
    'time': statistics.median(a / b for a, b in pairs),
    'seconds_of_a_step_alone': statistics.median(times['alone']) / count,
    'flops': flops,
    'bytes': count * read[0] / read[1],
    'megabytes_alone': memory[0],
    'megabytes_together': memory[1],
  }


def sweep(argv: list[str], count: int, vmap: int) -> dict[str, float]:
  """Seconds of a sweep over seeds, of CPU and of the clock."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, '-m', 'moepeft.sweep', *argv]
    command += [f'--grid=seed=0..{count - 1}', f'--vmap={vmap}']
    environment = {'JAX_COMPILATION_CACHE_DIR': os.path.join(folder, 'cache')}
    before, began = _cpu_seconds(), time.monotonic()
    subprocess.run(
      [*command, f'--workdir={folder}/sweep'],
      env=os.environ | environment,
      stdout=subprocess.DEVNULL,
      check=True,
    )
    clock = time.monotonic() - began
    return {'cpu': _cpu_seconds() - before, 'clock': clock}


def sweeps(count: int) -> dict[str, float]:
  """The ratios of a sweep alone over one of trials together."""
  flags_here = tuple(f'--{name}' for name in ('sweep', 'json', 'trials'))
  argv = [a for a in sys.argv[1:] if not a.startswith(flags_here)]
  alone, together = (sweep(argv, count, vmap) for vmap in (1, count))
  return {
    'trials': count,
    **{f'{key}_seconds_alone': value for key, value in alone.items()},
    **{f'{key}_seconds_together': value for key, value in together.items()},
    **{f'{key}_ratio': alone[key] / together[key] for key in alone},
  }


def _cpu_seconds() -> float:
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def main(argv) -> None:
  del argv
  config = _CONFIG.value
  config_check.check(config, registries.BY_KEY)
  if _JSON.value:
    command_line.check_can_write(_JSON.value)
  count = _TRIALS.value
  report = sweeps(count) if _SWEEP.value else steps(config, count)
  report = {key: round(value, 3) for key, value in report.items()}
  print(json.dumps(report, indent=2))
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(report, f, indent=2)


if __name__ == '__main__':
  _CONFIG = command_line.define_config('configs/molora_t5.py')
  _TRIALS = flags.DEFINE_integer(
    'trials', 4, 'The number of trials.', lower_bound=2
  )
  _ROUNDS = flags.DEFINE_integer(
    'rounds', 7, 'Turns of each side.', lower_bound=1
  )
  _SWEEP = flags.DEFINE_bool(
    'sweep', False, 'Compare sweeps over seeds, from start to end.'
  )
  _JSON = flags.DEFINE_string('json', None, 'Where to write the ratios.')
  command_line.run(main)
