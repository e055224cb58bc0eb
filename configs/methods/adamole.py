# SPDX-License-Identifier: Apache-2.0
"""AdaMoLE: experts above a threshold that each token learns.

Liu and Luo, arXiv:2405.00361.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/adamole.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (zefang-liu/AdaMoLE): its balance loss has
  the mean of p - t, which may be negative, where the text has the mean of p.
scale: alpha / r = 16 / 4 = 4, times weights that sum to one; the paper's LoRA
  baseline of rank 32 has 16 / 32 = 0.5, so the two differ in scale too.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(values, 'adamole', learning_rate=0.0001, length=256)
  c.optimizer.schedule = 'constant'
  c.router_losses.threshold_balance = 1e-3
  return c
