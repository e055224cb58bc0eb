# SPDX-License-Identifier: Apache-2.0
"""Routers, their losses and statistics, independent of adapters.

A new router is one file and one line in ROUTERS; docs/extending/router.md has a
worked example.
"""

from moepeft.core.registry import Registry
from moepeft.moe.router import RouterSpec as RouterSpec

ROUTERS: Registry = Registry(
  'router',
  'moepeft.moe.routers',
  {
    'softmax': 'softmax:ROUTER',
    'topk': 'topk:ROUTER',
    'uniform': 'uniform:ROUTER',
    'random': 'random:ROUTER',
    'localized': 'localized:ROUTER',
    'threshold': 'threshold:ROUTER',
    'magnitude': 'magnitude:ROUTER',
    'arrow': 'arrow:ROUTER',
    'phatgoose': 'phatgoose:ROUTER',
    'top_p': 'top_p:ROUTER',
    'sigmoid': 'sigmoid:ROUTER',
    'relu': 'relu:ROUTER',
    'hard': 'hard:ROUTER',
    'gumbel': 'gumbel:ROUTER',
    'sparsegen': 'sparsegen:ROUTER',
    'entropy_adaptive': 'entropy_adaptive:ROUTER',
    'noisy_topk': 'noisy_topk:ROUTER',
    'low_rank': 'low_rank:ROUTER',
    'balanced': 'balanced:ROUTER',
    'task': 'task:ROUTER',
    'sentence': 'sentence:ROUTER',
    'switch': 'switch:ROUTER',
    'expert_choice': 'expert_choice:ROUTER',
    'poly': 'poly:ROUTER',
    'hybrid': 'hybrid:ROUTER',
    'hash': 'hash:ROUTER',
    'token_mean': 'token_mean:ROUTER',
    'product_key': 'product_key:ROUTER',
    'random_then_mean': 'random_then_mean:ROUTER',
  },
)
# The router of a mixture whose method string names none.
DEFAULT_ROUTER = 'softmax'
