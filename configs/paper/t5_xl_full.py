# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning: the paper's 'T0' baseline on T5 1.1 xl (LM-adapted).

Zadouri et al., arXiv:2309.05444, with the released code's settings.
python -m moepeft.count --config=configs/paper/t5_xl_full.py
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, model='', data='')
  c = config_lib.paper('xl', v.model, v.data)
  c.method = 'full'
  c.optimizer.learning_rate = 1e-3
  c.batch_size = 256
  # TRAIN_STEPS=1_110_000 there: the clock goes on from 1,100,000 here too.
  c.steps = 10_000
  c.checkpoint.every_steps = 1_000
  return c
