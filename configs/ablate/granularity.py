# SPDX-License-Identifier: Apache-2.0
"""Many experts of low rank, or few of high rank, at one budget.

python -m moepeft.sweep --config=configs/ablate/granularity.py --workdir=DIR \
  --select=optimizer.learning_rate --evaluate

Of e experts of rank r, a layer whose inputs and outputs are as wide has 2 e r
parameters in experts and e in routers for each input; 2 e r + e is 90 for all
of these. On the embedded T5 the budgets are within 1 %.
"""

from moepeft import config as config_lib

GRID = {
  'method': (
    'lora(rank=45)',
    'molora(experts=2, rank=22)',
    'molora(experts=6, rank=7)',
    'molora(experts=10, rank=4)',
    'molora(experts=18, rank=2)',
    'molora(experts=30, rank=1)',
  ),
  # Each at alpha 16, and all at alpha / r = 4.
  'scale': ('', 'matched'),
  'optimizer.learning_rate': (5e-4, 1.5e-3, 5e-3),
  'seed': range(5),
}


def get_config(values: str = ''):
  return config_lib.ablation(values, 'molora(experts=10, rank=4)')
