# SPDX-License-Identifier: Apache-2.0
"""LoRA: the paper's LoRA on T5 1.1 large (LM-adapted).

Zadouri et al., arXiv:2309.05444, with the released code's settings.
Without a value the rank is the released lora.gin's, 16; the paper's table of
this size has rank 4.
python -m moepeft.count --config=configs/paper/t5_large_lora.py:rank=4
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, model='', data='', rank=16)
  c = config_lib.paper('large', v.model, v.data)
  c.method = f'lora(rank={v.rank})'
  c.checkpoint.every_steps = 50_000
  return c
