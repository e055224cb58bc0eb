# SPDX-License-Identifier: Apache-2.0
"""MoV: the paper's MoV on T5 1.1 xxl (LM-adapted).

Zadouri et al., arXiv:2309.05444, with the released code's settings.
python -m moepeft.count --config=configs/paper/t5_xxl_mov.py:experts=60
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, model='', data='', experts=30)
  c = config_lib.paper('xxl', v.model, v.data)
  c.method = f'mov(experts={v.experts})'
  return c
