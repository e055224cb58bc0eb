# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.count --config=FILE: counts parameters from shapes."""

import json

from moepeft import registries
from moepeft.checkpoints.count_parameters import count
from moepeft.config import check as config_check
from moepeft.config import command_line


def main(argv) -> None:
  del argv
  config_check.check_keys(_CONFIG.value, registries.BY_KEY)
  print(json.dumps(count(_CONFIG.value), indent=2))


if __name__ == '__main__':
  _CONFIG = command_line.define_config('configs/molora_t5.py')
  command_line.run(main)
