# SPDX-License-Identifier: Apache-2.0
"""Published mixtures and one LoRA of as many parameters, each at its alpha.

python -m moepeft.sweep --config=configs/ablate/methods.py --workdir=DIR \
  --select=optimizer.learning_rate --evaluate

Ranks are solved for the budget, within 5 %, as they are whole numbers. Scales
differ: alpha / r of lora(rank=45) is 0.36 and that of molora(rank=4) is 4, so
the best rates do, too: that of mov is 5e-2. configs/ablate/scale.py compares
the methods at one scale.
"""

from moepeft import config as config_lib

GRID = {
  'method': (
    'lora',
    'molora',
    'mov',
    'hydralora',
    'mixlora',
    'mola',
    'loramoe',
    'smear',
    'lily',
    'hmora',
    'moslora',
  ),
  'optimizer.learning_rate': (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2),
  'seed': range(5),
}


def get_config(values: str = ''):
  c = config_lib.ablation(values, 'molora')
  c.budget, c.budget_tolerance = 'params:molora(experts=10, rank=4)', 0.05
  return c
