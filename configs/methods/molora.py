# SPDX-License-Identifier: Apache-2.0
"""MoLoRA: low-rank experts, all of them weighted by a softmax.

Zadouri et al., arXiv:2309.05444.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/molora.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code; see docs/methods.md for where the text
  differs. Its training settings, on T5 and P3, are those of configs/paper/.
scale: alpha / r = 16 / 4 = 4, times weights that sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values, 'molora', learning_rate=3e-4, batch_size=32, length=1024
  )
  c.optimizer.name, c.optimizer.schedule = 'adafactor', 'constant'
  return c
