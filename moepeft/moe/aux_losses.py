# SPDX-License-Identifier: Apache-2.0
"""Router losses: pure functions of a site's sums, averaged over sites.

The paper's runs use none of them, by its text and its released code. Every
weight defaults to zero.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from moepeft.core.ranges import Range, suggestion
from moepeft.core.types import Array
from moepeft.moe import ROUTERS
from moepeft.moe.router import RouterLoss
from moepeft.moe.router_stats import RouterStats, over_experts


def load_balance(sums: RouterStats) -> Array:
  """e * sum_e f_e P_e, which is 1 for even routing.

  f is the fraction of tokens (no gradient), P the mean probability. Source:
  Switch Transformer (arXiv:2101.03961), equations 4 to 6, without alpha.
  """
  count = jnp.maximum(sums.count, 1)[..., None]
  products = (sums.load / count) * (sums.probability / count)
  return jnp.mean(sums.experts * jnp.sum(products, axis=-1))


def router_z_loss(sums: RouterStats) -> Array:
  """Mean squared log-partition. Source: ST-MoE (arXiv:2202.08906), eq. 5."""
  return jnp.mean(sums.log_z2 / jnp.maximum(sums.count, 1))


def entropy(sums: RouterStats) -> Array:
  """Mean entropy of the router in nats; minimizing it sharpens routing."""
  return jnp.mean(sums.entropy / jnp.maximum(sums.count, 1))


def importance(sums: RouterStats) -> Array:
  """CV^2 of the experts' sums of combine weights: variance over mean squared.

  Source: Shazeer et al., arXiv:1701.06538, equations 6 and 7.
  """
  available = None if sums.available is None else sums.available > 0
  mean = over_experts(jnp.mean, sums.importance, available)
  variance = over_experts(jnp.var, sums.importance, available)
  # A site without a token has no mean.
  return jnp.mean(variance / jnp.where(mean == 0, 1, mean**2))


# Of ln e, HMoRA's targets of H(mean p) and of the mean of H(p).
BALANCE, CERTAINTY = 0.98, 0.5


def generalized_js(sums: RouterStats) -> Array:
  """relu((BALANCE - CERTAINTY) ln e - (H(mean p) - mean H(p))) / ln e.

  The generalised Jensen-Shannon divergence of the tokens' probabilities p:
  large where each token is sure of its experts and all experts are used.
  Source: HMoRA (openreview lTkHiXeuDl). Its released code also bounds H(mean p)
  by BALANCE ln e, and each token's H(p) from below by CERTAINTY ln e, as the
  losses of the router `hybrid` do.
  """
  return divergence_gap(
    sums.probability, sums.entropy, sums.count, sums.experts
  )


def divergence_gap(
  probability: Array,
  entropies: Array,
  count: Array,
  experts: int | Array,
  most_balance: float = 1.0,
) -> Array:
  """`generalized_js` of sums over `count` tokens or examples.

  Args:
    probability: [(l,) e], the sum of p; entropies: [(l)], that of H(p).
    most_balance: of ln e, the bound of H(mean p) from above.
  """
  count = jnp.maximum(count, 1)
  mean = probability / count[..., None]
  # The slope of the entropy at 0 is infinite.
  used = mean > 0
  of_mean = jnp.sum(jnp.where(used, entr(jnp.where(used, mean, 1)), 0), axis=-1)
  most = jnp.log(jnp.asarray(experts, jnp.float32))
  divergence = jnp.minimum(of_mean, most_balance * most) - entropies / count
  gap = jax.nn.relu((BALANCE - CERTAINTY) * most - divergence)
  # One expert has no choice.
  return jnp.mean(gap / jnp.where(most == 0, 1, most))


# A negative weight maximizes a loss, such as the entropy.
_WEIGHT = Range(-1_000, 1_000)
LOSSES = {
  'load_balance': load_balance,
  'z': router_z_loss,
  'entropy': entropy,
  'importance': importance,
  'generalized_js': generalized_js,
}


def router_losses() -> dict[str, RouterLoss]:
  """All losses by name: those for every router, and those of entries."""
  losses = {name: RouterLoss(function) for name, function in LOSSES.items()}
  for entry in ROUTERS.values():
    losses |= entry.losses
  return losses


def check_weights(weights: Mapping[str, Any]) -> None:
  """
  Args:
    weights: config.router_losses.

  Raises:
    ValueError: a name is not a loss, or a weight is not a number in range; the
      message has the name.
  """
  losses = router_losses()
  for name, weight in weights.items():
    if name not in losses:
      raise ValueError(
        f'router losses are {", ".join(losses)}; got '
        f'config.router_losses.{name}{suggestion(name, losses)}'
      )
    _WEIGHT.check(f'config.router_losses.{name}', weight)


def auxiliary_loss(
  sites: dict[str, RouterStats], weights: dict[str, float]
) -> Array:
  """The weighted sum of losses, each the mean over its sites and layers.

  Args:
    sites: {path: RouterStats}, from `router_stats.collect`.
    weights: {name of a loss: weight}; losses with weight 0 are not computed.

  Raises:
    ValueError: as `check_weights`.
  """
  check_weights(weights)
  losses = router_losses()
  total = jnp.float32(0)
  for name, weight in weights.items():
    loss = losses[name]
    values = [
      loss.function(stats)
      for stats in sites.values()
      if weight and stats.aux.keys() >= set(loss.reads)
    ]
    if values:
      total += weight * sum(values) / len(values)
  return total
