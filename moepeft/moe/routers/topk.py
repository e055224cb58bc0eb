# SPDX-License-Identifier: Apache-2.0
"""Sparse routing: the k most probable experts (Shazeer et al., 2017)."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS, LinearGate, check_k, normalize, top_mask
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class TopK(LinearGate):
  """weights = softmax(x W) on the k largest, zero elsewhere.

  With `renormalize`, a row sums to one. Otherwise it sums to the k largest
  probabilities (the released code), initially about k / e, so that a mixture of
  vectors does not start at the base model. The semantics sets the default.

  Attributes:
    k: the number of experts per token.
    renormalize: whether the k probabilities are scaled to sum to one.
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
      weights = normalize(weights)
    return Routing(logits, weights, k=self.k)


ROUTER = RouterSpec(
  TopK,
  normalized=False,
  defaults={
    'official': {'renormalize': False},
    'paper': {'renormalize': True},
  },
)
