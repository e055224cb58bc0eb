# SPDX-License-Identifier: Apache-2.0
"""Batch size and learning rate of one LoRA and of molora at one budget.

python -m moepeft.sweep --config=configs/ablate/batch_lr.py --workdir=DIR \
  --evaluate

Runs have equally many steps, so that larger batches see more examples. All
rates are run with all seeds, as the rates are the result; alpha / r is 0.36 and
4.
"""

from moepeft import config as config_lib

GRID = {
  'method': ('lora(rank=45)', 'molora(experts=10, rank=4)'),
  'batch_size': (8, 16, 32, 64),
  'optimizer.learning_rate': (5e-4, 1.5e-3, 5e-3),
  'seed': range(3),
}


def get_config(values: str = ''):
  return config_lib.ablation(values, 'molora(experts=10, rank=4)')
