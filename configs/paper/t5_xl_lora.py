# SPDX-License-Identifier: Apache-2.0
"""LoRA: the paper's LoRA on T5 1.1 xl (LM-adapted).

Zadouri et al., arXiv:2309.05444, with the released code's settings.
The paper's table has ranks 4, 8 and 16; the released lora.gin has rank 16, on
large shapes alone.
python -m moepeft.count --config=configs/paper/t5_xl_lora.py:rank=4
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, model='', data='', rank=4)
  c = config_lib.paper('xl', v.model, v.data)
  c.method = f'lora(rank={v.rank})'
  c.checkpoint.every_steps = 50_000
  return c
