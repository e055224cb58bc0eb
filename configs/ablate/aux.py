# SPDX-License-Identifier: Apache-2.0
"""Weights of the router losses, for sparse routers.

python -m moepeft.sweep --config=configs/ablate/aux.py --workdir=DIR \
  --select=optimizer.learning_rate --evaluate

Load balance is Switch Transformer's (arXiv:2101.03961, weight 0.01 there); z is
ST-MoE's (arXiv:2202.08906, weight 0.001 there).
"""

from moepeft import config as config_lib

GRID = {
  'router': ('topk(k=1, renormalize=False)', 'topk(k=2, renormalize=True)'),
  'router_losses.load_balance': (0.0, 0.001, 0.01, 0.1),
  'router_losses.z': (0.0, 0.001),
  'optimizer.learning_rate': (5e-4, 1.5e-3, 5e-3),
  'seed': range(5),
}


def get_config(values: str = ''):
  return config_lib.ablation(values, 'molora(experts=10, rank=4)')
