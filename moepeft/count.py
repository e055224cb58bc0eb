# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.count --config=FILE: counts parameters and FLOPs.

Both are counted from shapes. --measure also compiles the training step, and
compares its time and memory with those of --baseline.
"""

import json

from absl import flags

from moepeft import registries
from moepeft.checkpoints.count_flops import flops_per_token
from moepeft.checkpoints.count_parameters import count
from moepeft.checkpoints.solve_method import with_explicit_method
from moepeft.config import check as config_check
from moepeft.config import command_line
from moepeft.config.budget import BASELINE
from moepeft.evaluation import step_cost


def main(argv) -> None:
  del argv
  config_check.check_keys(_CONFIG.value, registries.BY_KEY)
  config = with_explicit_method(_CONFIG.value)
  counts = {'method': config.method, **count(config)}
  if _FLOPS.value and (flops := flops_per_token(config)):
    counts['flops_per_token'] = {k: round(n) for k, n in flops.items()}
  if _MEASURE.value:
    counts['measured'] = step_cost.measure(
      config, _BASELINE.value, _ROUNDS.value
    )
  print(json.dumps(counts, indent=2))


if __name__ == '__main__':
  _CONFIG = command_line.define_config('configs/molora_t5.py')
  _FLOPS = flags.DEFINE_bool('flops', True, 'Count FLOPs, too.')
  _MEASURE = flags.DEFINE_bool(
    'measure', False, 'Compile the step; print its time and memory.'
  )
  _BASELINE = flags.DEFINE_string(
    'baseline', BASELINE, 'The method that --measure compares with.'
  )
  _ROUNDS = flags.DEFINE_integer(
    'rounds', 5, 'Turns of --measure.', lower_bound=1, upper_bound=1_000
  )
  command_line.run(main)
