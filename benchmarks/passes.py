# SPDX-License-Identifier: Apache-2.0
"""The time of a LoRA step by pass, beside that of peft on torch.

python benchmarks/passes.py [--shape=t5_small|smollm2] [--json=FILE]

The steps of `train_step.py` and `sft_step.py`, one after the other in one
process on one thread, so that the time of an operation is that of its work
alone; the shares of more threads differ where operations are too small to be
split. An operation's time is its median over the rounds. A pass of ours is
known by the path of an operation in the compiled program, one of torch's by its
name: torch's products of adapters and of the head are in `products`, its
residuals in `elementwise`. The floor is the time of all products at the rate of
one large product, measured in the same process.
"""

import collections
import glob
import importlib.util
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable

# Before JAX starts its threads: as many as there are cores.
if __name__ == '__main__':
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

# ruff: noqa: E402
import decode
import jax
import jax.numpy as jnp
import sft_step
import train_step
from absl import flags

from moepeft.config import command_line

SHAPES = ('t5_small', 'smollm2')
# The first pattern that an operation's path has names its pass. The product of
# a base's projection is below its adapter, which calls it.
OURS = {
  'attention': r'/core/',
  'adapter products': r'(\.\.\.[io],io|t[io],t[io])->.*dot_general$',
  'head and cross-entropy': r'/head/|logsumexp|log_terms|while',
  'products': r'dot_general$',
  'normalization': r'/norm/',
  'activation': r'/mlp/',
}
TORCHS = {
  'attention': r'scaled_dot_product|bmm$|::_softmax',
  'head and cross-entropy': r'log_softmax|nll_loss|cross_entropy',
  'products': r'::(mm|addmm|matmul|linear)$',
  'normalization': r'rsqrt|::mean|::pow',
  'activation': r'gelu|silu|tanh',
  'copies': r'copy_|clone|contiguous|::cat$',
}
# The sides of the matrices whose product gives the rate.
_SIZE = 2048


def pass_of(operation: str, patterns: dict[str, str], other: str) -> str:
  for name, pattern in patterns.items():
    if re.search(pattern, operation):
      return name
  return other


def our_passes(step: Callable, program: str, rounds: int) -> dict[str, float]:
  """{pass: milliseconds} of a compiled step.

  Args:
    program: the text of the compiled program, with the operations' paths.
  """
  paths = {
    match[1]: match[2]
    for line in program.splitlines()
    if (
      match := re.match(r'\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', line)
    )
  }
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(rounds):
        step()
    (path,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
    profile = jax.profiler.ProfileData.from_file(path)
  times = collections.defaultdict(list)
  for plane in profile.planes:
    for line in plane.lines:
      for event in line.events:
        if event.name in paths or re.match(r'(copy|transpose)', event.name):
          times[event.name].append(event.duration_ns / 1e6)
  total = collections.Counter()
  for name, each in times.items():
    turns = re.match(r'(copy|transpose)', name)
    kind = 'copies' if turns else pass_of(paths[name], OURS, 'elementwise')
    total[kind] += statistics.median(each) * len(each) / rounds
  return dict(total)


def torch_passes(step: Callable, rounds: int) -> dict[str, float]:
  """{pass: milliseconds} of a step in torch."""
  from torch import profiler

  with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profile:
    for _ in range(rounds):
      step()
  total = collections.Counter()
  for event in profile.key_averages():
    kind = pass_of(event.key, TORCHS, 'elementwise')
    total[kind] += event.self_cpu_time_total / 1e3 / rounds
  return dict(total)


def product_rate() -> float:
  """FLOPs/s of a product of two large matrices."""
  x = jnp.ones((_SIZE, _SIZE), jnp.float32)
  product = jax.jit(jnp.matmul).lower(x, x).compile()
  seconds = []
  for _ in range(4):
    began = time.perf_counter()
    jax.block_until_ready(product(x, x))
    seconds.append(time.perf_counter() - began)
  return 2 * _SIZE**3 / min(seconds)


def sides(shape: str) -> tuple[jax.stages.Compiled, tuple, Callable]:
  """(our compiled step, its arguments, torch's step)."""
  if shape == 't5_small':
    step, arguments = train_step.compile_jax(*train_step.SIDES['lora'])
    return step, arguments, train_step.make_peft().run
  model = decode.theirs('')
  config, params = decode.read(model)
  step, arguments = sft_step.compile_jax(
    config, params, *sft_step.SIDES['lora']
  )
  return step, arguments, sft_step.torch_side(model).run


def measure(shape: str, rounds: int) -> dict[str, dict[str, float]]:
  """{side: {pass: milliseconds}}."""
  for name in ('torch', 'peft', 'transformers'):
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f'{name} is not installed, with which the step is compared; pip '
        'install torch==2.13.0 peft transformers'
      )
  import torch

  torch.set_num_threads(1)
  step, arguments, their_step = sides(shape)

  def our_step():
    jax.block_until_ready(step(*arguments))

  for run in (our_step, their_step):
    run()
  flops = step.cost_analysis()['flops']
  return {
    'ours': our_passes(our_step, step.as_text(), rounds),
    'torch': torch_passes(their_step, rounds),
    'floor': {'products': 1e3 * flops / product_rate()},
  }


def main(argv) -> None:
  del argv
  if _JSON.value:
    command_line.check_can_write(_JSON.value)
  times = measure(_SHAPE.value, _ROUNDS.value)
  print('| pass | ours, ms | torch, ms |')
  print('| --- | ---: | ---: |')
  for name in dict.fromkeys([*OURS, *TORCHS, 'elementwise']):
    ours, theirs = (times[side].get(name) for side in ('ours', 'torch'))
    if ours or theirs:
      cells = ('-' if x is None else f'{x:.0f}' for x in (ours, theirs))
      print(f'| {name} | {" | ".join(cells)} |')
  totals = (f'{sum(times[side].values()):.0f}' for side in ('ours', 'torch'))
  print(f'| all | {" | ".join(totals)} |')
  print(f'floor of all products: {times["floor"]["products"]:.0f} ms')
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(times, f, indent=2)


if __name__ == '__main__':
  _JSON = flags.DEFINE_string('json', None, 'Where to write the times.')
  _SHAPE = flags.DEFINE_enum('shape', SHAPES[0], SHAPES, 'Whose step to take.')
  _ROUNDS = flags.DEFINE_integer(
    'rounds', 5, 'Steps of each side.', lower_bound=1
  )
  command_line.run(main)
