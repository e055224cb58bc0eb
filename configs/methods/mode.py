# SPDX-License-Identifier: Apache-2.0
"""MoDE: one A, and a router for each of its columns over rank-one experts.

Ning et al., arXiv:2408.01505.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/mode.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: there is no released code, and of the paper only the abstract and
  summaries were read: one A for all experts, and a mixture of rank-one experts
  for each column and token. The softmax routers of the projection's input, the
  initial values, rank, experts and rates are those of molora, not the paper's.
scale: alpha / r = 16 / 4 = 4, times weights that sum to one in each column.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  return config_lib.finetuning(values, 'mode', learning_rate=3e-4)
