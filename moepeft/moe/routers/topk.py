# SPDX-License-Identifier: Apache-2.0
"""Sparse routing: the k most probable experts (Shazeer et al., 2017)."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS, LinearGate, check_k, normalized, top_mask
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class TopK(LinearGate):
  """weights = softmax(x W) on the k largest, zero elsewhere.

  A row sums to one where `renormalize`, else to the k largest probabilities
  (the released code): about k / e at first, so that a mixture of vectors does
  not start at the base model. The semantics decides where it is not given.

  Attributes:
    k: how many of its experts a token uses.
    renormalize: whether the kept probabilities are scaled to sum to one.
  """

  k: int = option(1, EXPERTS)
  renormalize: bool = False

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    check_k('topk', self.k, self.experts)
    logits, noisy = self.logits(x, ctx)
    probabilities = softmax(noisy)
    weights = jnp.where(top_mask(probabilities, self.k), probabilities, 0)
    if self.renormalize:
      weights = normalized(weights)
    return Routing(logits, weights, k=self.k)


ROUTER = RouterSpec(
  TopK,
  normalized=False,
  defaults={
    'official': {'renormalize': False},
    'paper': {'renormalize': True},
  },
)
