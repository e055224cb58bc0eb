# SPDX-License-Identifier: Apache-2.0
"""Sites of molora at one budget: attention, feed-forward, encoder, decoder.

python -m moepeft.sweep --config=configs/ablate/sites.py --workdir=DIR \
  --select=optimizer.learning_rate --evaluate

The rank is solved so that all have the parameters of the first, within 5 %,
and alpha so that alpha / r is 4 for all. Sites have T5's names.
"""

from moepeft import config as config_lib

_ATTENTION = '*/q|*/k|*/v|*/o'
_MLP = '*/wi_0|*/wo'
_ALL = f'{_ATTENTION}|{_MLP}'

GRID = {
  'targets': (
    _ALL,
    _ATTENTION,
    _MLP,
    '*/q|*/v',
    _ALL.replace('*/', 'encoder/*/'),
    _ALL.replace('*/', 'decoder/*/'),
  ),
  'optimizer.learning_rate': (5e-4, 1.5e-3, 5e-3),
  'seed': range(5),
}


def get_config(values: str = ''):
  c = config_lib.ablation(values, 'molora(experts=10)')
  c.budget, c.budget_tolerance = 'params:molora(experts=10, rank=4)', 0.05
  c.scale = 'matched'
  return c
