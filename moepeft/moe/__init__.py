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
  },
)
# The router of a mixture whose method string names none.
DEFAULT_ROUTER = 'softmax'
