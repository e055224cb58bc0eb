# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.ngrams --config=FILE: n-grams on a config's held-out text.

The command prints the loss of n-gram language models in nats per target, a
baseline for models that are trained from scratch on the same text.
"""

import json

from absl import flags

from moepeft import registries
from moepeft.config import check as config_check
from moepeft.config import command_line
from moepeft.core import files
from moepeft.evaluation import ngrams


def main(argv) -> None:
  del argv
  if _JSON.value:
    command_line.check_can_write(_JSON.value)
  config_check.check_keys(_CONFIG.value, registries.BY_KEY)
  n_targets, losses = ngrams.baseline(_CONFIG.value, _ORDER.value)
  print(f'nats a target, of {n_targets:,} held-out targets')
  for n, nats in enumerate(losses, 1):
    best = '  the least' if nats == min(losses) else ''
    print(f'{n}-gram  {nats:.4f}{best}')
  if _JSON.value:
    files.write_text(_JSON.value, json.dumps(dict(enumerate(losses, 1))))


if __name__ == '__main__':
  _CONFIG = command_line.define_config('configs/pretrain_gpt_tiny.py')
  _ORDER = flags.DEFINE_integer(
    'order',
    8,
    'The largest n.',
    lower_bound=1,
    upper_bound=64,
  )
  _JSON = flags.DEFINE_string('json', None, 'Where to write the losses.')
  command_line.run(main)
