# SPDX-License-Identifier: Apache-2.0
"""Routers that only tests use, one of each kind that the form has to hold."""

import contextlib

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Routing
from moepeft.moe import ROUTERS
from moepeft.moe.gate import EXPERTS, INIT, gate_logits, top_mask
from moepeft.moe.router import RouterLoss, RouterSpec
from moepeft.moe.router_state import router_state
from moepeft.nn.initializers import peft_param
from moepeft.nn.numerics import softmax


class Balanced(nn.Module):
  """Top-k by probability plus a bias that moves against the load.

  Source: Wang et al., arXiv:2408.15664 (auxiliary-loss-free balancing).
  """

  experts: int = option(1, EXPERTS)
  k: int = option(1, EXPERTS)
  rate: float = option(0.125, Range(0, 1))

  @nn.compact
  def __call__(self, x, ctx):
    kernel = peft_param(self, 'kernel', INIT, (x.shape[-1], self.experts), 'ie')
    bias = router_state(self, 'bias', (self.experts,), 'e')
    logits = gate_logits(x, kernel)
    p = softmax(logits)
    weights = jnp.where(top_mask(p + bias, self.k), p, 0)
    return Routing(logits, weights, k=self.k)


def balance(router, state, sums):
  """bias + rate sign(mean load - load)."""
  mean = jnp.mean(sums.share, axis=-1, keepdims=True)
  return {'bias': state['bias'] + router.rate * jnp.sign(mean - sums.share)}


class Squared(nn.Module):
  """Softmax routing that reports the squares of its logits."""

  experts: int = option(1, EXPERTS)

  @nn.compact
  def __call__(self, x, ctx):
    kernel = peft_param(self, 'kernel', INIT, (x.shape[-1], self.experts), 'ie')
    logits = gate_logits(x, kernel)
    return Routing(logits, softmax(logits), aux={'square': logits**2})


def mean_square(sums):
  """The mean over tokens, experts and layers."""
  count = jnp.maximum(sums.count, 1)[..., None]
  return jnp.mean(sums.aux['square'] / count)


ENTRIES = {
  'balanced': RouterSpec(Balanced, normalized=False, update=balance),
  'squared': RouterSpec(
    Squared, losses={'square': RouterLoss(mean_square, reads=('square',))}
  ),
}


@contextlib.contextmanager
def registered():
  """The routers are in ROUTERS within it."""
  for name, entry in ENTRIES.items():
    ROUTERS.register(name, entry)
  try:
    yield
  finally:
    for name in ENTRIES:
      del ROUTERS._entries[name]
