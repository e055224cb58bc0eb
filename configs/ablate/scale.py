# SPDX-License-Identifier: Apache-2.0
"""The methods of configs/ablate/methods.py at one budget and one alpha / r.

python -m moepeft.sweep --config=configs/ablate/scale.py --workdir=DIR \
  --select=optimizer.learning_rate --evaluate

The scales are those of lora(rank=16), lora(rank=4) and lora(rank=1) with the
default alpha of 16: 1, 4 and 16. A rate that is chosen for each scale shows how
much of a scale's effect a rate can undo. mov and smear have no alpha.
"""

from moepeft import config as config_lib

GRID = {
  'method': (
    'lora',
    'molora',
    'hydralora',
    'mixlora',
    'mola',
    'loramoe',
    'lily',
    'hmora',
    'moslora',
  ),
  'scale': ('matched:lora(rank=16)', 'matched', 'matched:lora(rank=1)'),
  'optimizer.learning_rate': (1.5e-4, 5e-4, 1.5e-3, 5e-3),
  'seed': range(5),
}


def get_config(values: str = ''):
  c = config_lib.ablation(values, 'molora')
  c.budget, c.budget_tolerance = 'params:molora(experts=10, rank=4)', 0.05
  return c
