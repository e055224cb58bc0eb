# SPDX-License-Identifier: Apache-2.0
"""The rank of one LoRA and of the experts of molora, at one alpha / r.

python -m moepeft.sweep --config=configs/ablate/rank.py --workdir=DIR \
  --select=optimizer.learning_rate --evaluate

With one alpha a larger rank would also be a smaller scale.
"""

from moepeft import config as config_lib

GRID = {
  'method': ('lora', 'molora(experts=10)'),
  'rank': (1, 2, 4, 8, 16),
  'optimizer.learning_rate': (5e-4, 1.5e-3, 5e-3),
  'seed': range(5),
}


def get_config(values: str = ''):
  c = config_lib.ablation(values, 'molora(experts=10)')
  c.scale = 'matched'
  return c
