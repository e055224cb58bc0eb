# SPDX-License-Identifier: Apache-2.0
"""LoRAMoE: experts of two groups of tasks, balanced within each.

Dou et al., arXiv:2312.09979.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/loramoe.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released script (Ablustrund/LoRAMoE), where delta and the
  weight of the loss are 0. The paper's localised balance is
  router=localized(tasks=[...], group=[...], delta=0.1) with
  --config.router_losses.localized_balance=0.1, two values that were not
  verified against the paper, and 6 experts in its text. The code sums the loss
  over all sites, here it is averaged.
scale: alpha / r = 32 / 4 = 8, times weights that sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  return config_lib.finetuning(
    values, 'loramoe', learning_rate=2e-4, length=1024
  )
