# SPDX-License-Identifier: Apache-2.0
"""MoLA: more experts in higher layers.

Gao et al., arXiv:2402.08562.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/mola.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (GCYZSL/MoLA), whose balance loss is off by
  default; counts by quarters 2, 4, 6, 8. The code has a list of counts, here
  `experts_per_layer` has the name of the shape or such a list.
scale: alpha / r = 16 / 8 = 2, times weights that sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values, 'mola', learning_rate=0.0003, batch_size=128, length=256
  )
  c.optimizer.schedule = 'linear'
  return c
