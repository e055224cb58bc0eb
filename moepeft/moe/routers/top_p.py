# SPDX-License-Identifier: Apache-2.0
"""The fewest experts that hold a share of the probability: top-p routing."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate, normalize, sorted_mass
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class TopP(LinearGate):
  """weights = softmax(x W) on the fewest experts whose sum is p, else zero.

  A token that is sure takes few experts, another takes many. Source: Huang et
  al., arXiv:2403.07652; MixLoRA's `dynamic` router
  (arXiv:2404.15159) has p 0.8 and leaves the probabilities as they are. Its
  released code divides the probabilities by a temperature; here the
  temperature divides the logits.

  Attributes:
    p: what the experts' probabilities sum to at least.
    renormalize: whether their weights are scaled to sum to one.
  """

  p: float = option(0.8, Range(0, 1, above=True))
  renormalize: bool = False

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    probabilities = softmax(noisy)
    mass, _ = sorted_mass(probabilities)
    # An expert is needed where those before it do not suffice.
    needed = mass - probabilities < self.p
    weights = jnp.where(needed, probabilities, 0)
    if self.renormalize:
      weights = normalize(weights)
    return Routing(logits, weights, selects=True)


ROUTER = RouterSpec(TopP, normalized=False)
