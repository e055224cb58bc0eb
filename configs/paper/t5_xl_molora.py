# SPDX-License-Identifier: Apache-2.0
"""MoLoRA: the paper's MoLoRA on T5 1.1 xl (LM-adapted).

Zadouri et al., arXiv:2309.05444, with the released code's settings.
python -m moepeft.count --config=configs/paper/t5_xl_molora.py:experts=2,rank=4
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, model='', data='', experts=10, rank=4)
  c = config_lib.paper('xl', v.model, v.data)
  c.method = f'molora(experts={v.experts}, rank={v.rank})'
  return c
