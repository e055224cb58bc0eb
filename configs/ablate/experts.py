# SPDX-License-Identifier: Apache-2.0
"""The number of experts of molora at rank 4: parameters grow with it.

python -m moepeft.sweep --config=configs/ablate/experts.py --workdir=DIR \
  --select=optimizer.learning_rate --evaluate

configs/ablate/granularity.py has as many parameters for each number.
"""

from moepeft import config as config_lib

GRID = {
  'experts': (1, 2, 5, 10, 20, 30),
  'optimizer.learning_rate': (5e-4, 1.5e-3, 5e-3),
  'seed': range(5),
}


def get_config(values: str = ''):
  return config_lib.ablation(values, 'molora(rank=4)')
