# SPDX-License-Identifier: Apache-2.0
"""SMEAR: one bottleneck of merged parameters for each example.

Muqeeth et al., arXiv:2306.03745.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/smear.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (r-three/smear) on T5 base, which trains the
  layer norms too, has a mean over padding as well, and smooths labels by 0.1.
  In a decoder the mean is over the prompt alone.
scale: none; bottlenecks have no alpha.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(values, 'smear', learning_rate=3e-4, batch_size=128)
  c.optimizer.schedule = 'constant'
  return c
