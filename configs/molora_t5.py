# SPDX-License-Identifier: Apache-2.0
"""MoLoRA on the embedded tasks: the default run; CPU, a few minutes.

python -m moepeft.train --config=configs/molora_t5.py --workdir=/tmp/molora
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, experts=10, rank=4)
  c = config_lib.default()
  c.method = f'molora(experts={v.experts}, rank={v.rank})'
  c.data.inputs_length = 100
  c.data.targets_length = 16
  c.model.scan_unroll = 3
  # The base was pretrained without; 300 steps do not overfit endless data.
  c.model.dropout = 0.0
  c.optimizer.learning_rate = 1.5e-3
  return c
