# SPDX-License-Identifier: Apache-2.0
"""LoRA+: LoRA whose B has 16 times the learning rate of A.

Hayou et al., arXiv:2402.12354.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/loraplus.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the paper's ratio of 2^4; the example of the released code
  (nikhil-ghosh-berkeley/loraplus) has 20, with the rate of A that is here, and
  its scripts others. The ratio was not verified against the paper.
scale: alpha / r = 16 / 8 = 2.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values, 'lora(rank=8, alpha=16.0, a_init=kaiming)', learning_rate=5e-5
  )
  c.optimizer.groups = '*/lora/b: rate_ratio=16'
  return c
