# SPDX-License-Identifier: Apache-2.0
"""SMEAR: one bottleneck of merged parameters for each example.

Muqeeth et al., arXiv:2306.03745.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/smear.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (r-three/smear) on T5 base, which trains the
  layer norms too and has a mean over padding as well. It also normalizes what
  the bottleneck adds, and draws the projection up at random, without a bias;
  here it starts at zero, so that the model starts as the base. Its dropout of
  experts may drop the best one, here that one stays. In a decoder the mean is
  over the prompt alone.
scale: none; bottlenecks have no alpha.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(values, 'smear', learning_rate=3e-4, batch_size=128)
  c.optimizer.schedule = 'constant'
  c.loss.label_smoothing = 0.1
  return c
