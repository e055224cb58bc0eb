# SPDX-License-Identifier: Apache-2.0
"""LoRA: the paper's LoRA on T5 1.1 xxl (LM-adapted).

Zadouri et al., arXiv:2309.05444, with the released code's settings.
The paper's table of this size has no LoRA; 4 is the least rank of the others.
python -m moepeft.count --config=configs/paper/t5_xxl_lora.py:rank=4
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, model='', data='', rank=4)
  c = config_lib.paper('xxl', v.model, v.data)
  c.method = f'lora(rank={v.rank})'
  c.checkpoint.every_steps = 50_000
  return c
