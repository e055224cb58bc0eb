# SPDX-License-Identifier: Apache-2.0
"""Routers, their losses and statistics; nothing here knows an adapter.

A new router is one new file and one line in ROUTERS.
"""

from moepeft.moe.routers.random import Random
from moepeft.moe.routers.softmax import Softmax
from moepeft.moe.routers.topk import TopK
from moepeft.moe.routers.uniform import Uniform

ROUTERS = {
  'softmax': Softmax,
  'topk': TopK,
  'uniform': Uniform,
  'random': Random,
}
