# SPDX-License-Identifier: Apache-2.0
"""AdaMix: a random bottleneck in training, merged bottlenecks after it.

Wang et al., arXiv:2205.12410.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/adamix.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (microsoft/AdaMix) and its script of RoBERTa
  large: a bottleneck after the feed-forward, whose projection up all experts
  share. The code draws an expert for each batch and layer; here each example
  draws. Its code for generation weights the consistency by 100, that for
  classification by 1, as here. Bottlenecks start at the base's function here,
  and as torch.nn.Linear there.
scale: none; bottlenecks have no alpha.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(values, 'adamix', learning_rate=3e-4, batch_size=64)
  c.optimizer.schedule = 'linear'
  c.optimizer.weight_decay = 0.1
  c.loss.consistency = 1.0
  return c
