# SPDX-License-Identifier: Apache-2.0
"""MoV: (IA)3 vectors, all of them weighted by a softmax.

Zadouri et al., arXiv:2309.05444.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/mov.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code, whose router reads each head of a projected
  key or value; the text's reads the whole output (--config.semantics=paper).
  Its training settings, on T5 and P3, are those of configs/paper/.
scale: none; vectors start at one, and their weights sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values, 'mov', learning_rate=3e-4, batch_size=32, length=1024
  )
  c.optimizer.name, c.optimizer.schedule = 'adafactor', 'constant'
  return c
