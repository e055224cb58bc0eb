# SPDX-License-Identifier: Apache-2.0
"""Router losses: pure functions of a site's sums, averaged over sites.

Losses of the experts' parameters alone are beside them; a training step
evaluates these once.

The paper's runs use none of them, by its text and its released code. Every
weight defaults to zero.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from moepeft.core.ranges import Range, is_zero, suggestion
from moepeft.core.types import Array, Tree
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
  """Mean squared log-partition. Source: ST-MoE (arXiv:2202.08906)."""
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


def orthogonality(a: Array) -> Array:
  """sum_{e<f} |A_e^T A_f|^2 (Frobenius) of experts A [i, e, r].

  Source: O-LoRA (Wang et al., arXiv:2310.14152), its loss between the subspaces
  of tasks, here between experts.
  """
  products = jnp.einsum('ier,ifs->efrs', a, a)
  pairs = jnp.triu(jnp.ones(products.shape[:2]), 1)
  return jnp.einsum('efrs,ef->', products**2, pairs)


# Losses of the down-projections of a mixture's experts, [i, e, r] in a layer.
PARAMETER_LOSSES = {'orthogonality': orthogonality}


def parameter_loss(
  tree: Tree, arrays: Collection[str], weights: Mapping[str, float]
) -> Array:
  """The weighted sum of PARAMETER_LOSSES, each the mean over arrays and layers.

  Args:
    tree: below 'layers', the first axis of an array is that of layers.
    arrays: regular expressions of the paths of [*in, e, r],
      `peft.build.Built.down_arrays`.
    weights: {name of a loss: weight}; those of other losses are left out.
  """
  total = jnp.float32(0)
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  stacks = [
    array.reshape(
      array.shape[0] if 'layers' in path.split('/') else 1,
      -1,
      *array.shape[-2:],
    )
    for path, array in flat.items()
    if any(re.search(pattern, path) for pattern in arrays)
  ]
  for name, function in PARAMETER_LOSSES.items():
    if stacks and not is_zero(weights.get(name, 0)):
      values = [jnp.mean(jax.vmap(function)(stack)) for stack in stacks]
      total += weights[name] * sum(values) / len(values)
  return total


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
  losses = {**router_losses(), **PARAMETER_LOSSES}
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
    weights: {name of a loss: weight}; losses with weight 0 are not computed,
      nor those of parameters.

  Raises:
    ValueError: as `check_weights`.
  """
  check_weights(weights)
  losses = router_losses()
  total = jnp.float32(0)
  for name, weight in weights.items():
    if name in PARAMETER_LOSSES:
      continue
    loss = losses[name]
    values = [
      loss.function(stats)
      for stats in sites.values()
      if not is_zero(weight) and stats.aux.keys() >= set(loss.reads)
    ]
    if values:
      total += weight * sum(values) / len(values)
  return total
