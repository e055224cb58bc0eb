# SPDX-License-Identifier: Apache-2.0
"""Sparse routing that a bias balances, without a loss."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS, LinearGate, check_k, top_mask
from moepeft.moe.router import RouterSpec
from moepeft.moe.router_state import against_load, router_state
from moepeft.moe.router_stats import RouterStats
from moepeft.nn.numerics import softmax


class Balanced(LinearGate):
  """weights = p for the k largest p + b, else 0; p = softmax(x W).

  b chooses experts and weights none. It is state, which moves by `rate`
  towards even loads after each optimizer step. So a token may be sent to an
  expert whose weight p is small; `renormalize` keeps the sum of its weights 1.

  Source: Wang et al., arXiv:2408.15664, with a softmax as the gate.

  Parameters: kernel [i, e]. State: bias [e].

  Attributes:
    k: how many of its experts a token uses.
    renormalize: whether the chosen probabilities are scaled to sum to one.
    rate: a step of b.
  """

  k: int = option(1, EXPERTS)
  renormalize: bool = False
  rate: float = option(1e-3, Range(0, 1), training_only=True)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    check_k('balanced', self.k, self.experts)
    logits, noisy = self.logits(x, ctx)
    bias = router_state(self, 'bias', (self.experts,), 'e')
    p = softmax(noisy)
    # Experts that are masked or dropped have no probability.
    scores = jnp.where(p > 0, p + bias, -jnp.inf)
    weights = jnp.where(top_mask(scores, self.k), p, 0)
    if self.renormalize:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(logits, weights, k=self.k)


def update(
  router: Balanced, state: dict[str, Array], sums: RouterStats
) -> dict[str, Array]:
  """b + rate * sign(the mean load - the expert's load)."""
  return {'bias': against_load(state['bias'], router.rate, sums)}


ROUTER = RouterSpec(Balanced, normalized=False, update=update)
