# SPDX-License-Identifier: Apache-2.0
"""Routers that only tests use, of kinds that no published one is."""

import contextlib

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import option
from moepeft.core.types import Routing
from moepeft.moe import ROUTERS
from moepeft.moe.gate import EXPERTS, INIT, gate_logits
from moepeft.moe.router import RouterLoss, RouterSpec
from moepeft.nn.initializers import peft_param
from moepeft.nn.numerics import softmax


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


class Future(nn.Module):
  """Routes by the mean over the whole row: what a decoder must not do."""

  experts: int = option(1, EXPERTS)

  @nn.compact
  def __call__(self, x, ctx):
    mean = jnp.broadcast_to(jnp.mean(x, axis=1, keepdims=True), x.shape)
    kernel = peft_param(self, 'kernel', INIT, (x.shape[-1], self.experts), 'ie')
    logits = gate_logits(mean, kernel)
    return Routing(logits, softmax(logits))


ENTRIES = {
  'future': RouterSpec(Future, causal=False),
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
