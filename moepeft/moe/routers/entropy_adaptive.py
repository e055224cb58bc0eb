# SPDX-License-Identifier: Apache-2.0
"""Few experts for sure tokens, all for unsure ones: DynMoLE's router."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS, LinearGate, sorted_mass
from moepeft.moe.router import RouterLoss, RouterSpec
from moepeft.moe.router_stats import RouterStats
from moepeft.nn.numerics import softmax

# Added to probabilities before their entropy, as in the released code.
EPSILON = 1e-5


class EntropyAdaptive(LinearGate):
  """weights = p = softmax(x W) on the experts that a token needs, else zero.

  Those are, in the order of p, all whose sum stays within `p`, and always the
  first `min_experts`; where the entropy of p is above `entropy_threshold`, all.
  The weights stay as they are. Source: DynMoLE (arXiv:2504.00661); selection
  and losses follow its code, a branch of MoE-PEFT.

  Attributes:
    p: the sum of probabilities that the experts stay within.
    min_experts: how many a token has at least.
    entropy_threshold: of the Tsallis entropy over its largest value; 1 for
      never all experts.
    q: the entropy's index, not 1; near 1 it is Shannon's.
  """

  p: float = option(0.75, Range(0, 1))
  min_experts: int = option(2, EXPERTS)
  entropy_threshold: float = option(0.9, Range(0, 1))
  q: float = option(1.1, Range(1, 10, above=True))

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    p = softmax(noisy)
    entropy = tsallis_entropy(p, self.q, jnp.isfinite(logits))
    mass, rank = sorted_mass(p)
    unsure = entropy[..., None] > self.entropy_threshold
    needed = (mass <= self.p) | (rank < self.min_experts) | unsure
    weights = jnp.where(needed, p, 0)
    aux = {'tsallis_entropy': entropy, 'adaptive_weight': weights}
    return Routing(logits, weights, selects=True, aux=aux)


def tsallis_entropy(p: Array, q: float, available: Array) -> Array:
  """(1 - sum_e p_e^q) / (1 - n^(1 - q)) [...] of n available experts.

  The largest value, of the uniform p, is 1 (but for EPSILON).
  """
  count = jnp.maximum(jnp.sum(available, axis=-1), 2).astype(jnp.float32)
  powers = jnp.where(available, (p + EPSILON) ** q, 0)
  return (1 - jnp.sum(powers, axis=-1)) / (1 - count ** (1 - q))


def tsallis_loss(sums: RouterStats) -> Array:
  """The mean entropy, over its largest value. DynMoLE's weight is 0.01."""
  return jnp.mean(sums.aux['tsallis_entropy'] / jnp.maximum(sums.count, 1))


def adaptive_balance(sums: RouterStats) -> Array:
  """e * sum_e w_e P_e of the mean weights w. DynMoLE's weight is 0.001.

  The released code has weights here, not counts, and they have a gradient.
  """
  count = jnp.maximum(sums.count, 1)[..., None]
  products = (sums.aux['adaptive_weight'] / count) * (sums.probability / count)
  return jnp.mean(sums.experts * jnp.sum(products, axis=-1))


ROUTER = RouterSpec(
  EntropyAdaptive,
  normalized=False,
  losses={
    'tsallis_entropy': RouterLoss(tsallis_loss, ('tsallis_entropy',)),
    'adaptive_balance': RouterLoss(adaptive_balance, ('adaptive_weight',)),
  },
)
