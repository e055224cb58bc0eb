# SPDX-License-Identifier: Apache-2.0
"""HydraLoRA: experts that share one A.

Tian et al., arXiv:2404.19245.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/hydralora.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released script (Clin0212/HydraLoRA): 4 experts of rank 4
  where the paper's table has rank 8, and no router loss. The number of experts
  is the developer's choice there; the paper suggests one by k-means on the
  data.
scale: alpha / r = 32 / 4 = 8, times weights that sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  return config_lib.finetuning(
    values, 'hydralora', learning_rate=0.0002, length=1024
  )
