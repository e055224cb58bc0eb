# SPDX-License-Identifier: Apache-2.0
"""Routers of molora(experts=10, rank=4).

python -m moepeft.sweep --config=configs/ablate/router.py --workdir=DIR \
  --select=optimizer.learning_rate --evaluate

A renormalised top-1 weight is always one, so no gradient of the task reaches
that router. uniform and random have no parameters, so those mixtures train 12 %
fewer on the embedded T5. The scale differs too: weights of topk without
renormalisation, and of sigmoid, do not sum to one.
"""

from moepeft import config as config_lib

GRID = {
  'router': (
    'softmax',
    'topk(k=1, renormalize=False)',
    'topk(k=1, renormalize=True)',
    'topk(k=2, renormalize=False)',
    'topk(k=2, renormalize=True)',
    'sigmoid',
    'uniform',
    'random(k=1)',
    'random(k=2)',
  ),
  'optimizer.learning_rate': (5e-4, 1.5e-3, 5e-3),
  'seed': range(5),
}


def get_config(values: str = ''):
  return config_lib.ablation(values, 'molora(experts=10, rank=4)')
