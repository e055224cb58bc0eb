# SPDX-License-Identifier: Apache-2.0
"""(IA)^3: the paper's (IA)^3 on T5 1.1 large (LM-adapted).

Zadouri et al., arXiv:2309.05444, with the released code's settings.
python -m moepeft.count --config=configs/paper/t5_large_ia3.py
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, model='', data='')
  c = config_lib.paper('large', v.model, v.data)
  c.method = 'ia3'
  c.checkpoint.every_steps = 50_000
  return c
