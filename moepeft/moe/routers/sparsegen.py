# SPDX-License-Identifier: Apache-2.0
"""Sparse weights whose sparsity a token chooses: LD-MoLE's router."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate, gate_logits
from moepeft.moe.router import RouterLoss, RouterSpec
from moepeft.moe.router_stats import RouterStats
from moepeft.nn.initializers import Constant, kaiming_uniform, peft_param

# 1 - l is at least this.
EPSILON = 0.01
# `sparsegen_gap` asks for at most this many experts.
TARGET = 2


class Sparsegen(LinearGate):
  """weights = max(z - t, 0) / (1 - l) of z = x W, which sum to one.

  t is the number that makes them so, and l = logsigmoid(MLP(x)) + 0.99 says how
  sparse they are: near 1 the best expert has all, far below every expert has
  some. Source: LD-MoLE (arXiv:2509.25684); sparsegen is Laha et al.'s
  (arXiv:1810.11975). The paper has one MLP for each input width, which all
  sites of the network share; here each site has its own.

  Parameters: kernel [i, e]; of the MLP, with a ReLU between, hidden_kernel
  [i, r], hidden_bias [r], output_kernel [r], output_bias []. The last starts at
  -2.5, as in the released code; there hidden_bias does too, four standard
  deviations below zero, so that hardly a hidden unit is ever above it. Here it
  starts at zero.

  Attributes:
    hidden: r, the MLP's hidden size.
  """

  hidden: int = option(256, Range(1, 65_536))

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    sparsity = self._sparsity(x)
    gap = jax.nn.relu(lower_bound(logits, TARGET) - sparsity)
    weights = sparsegen(noisy, sparsity[..., None])
    aux = {
      'sparsegen_weight': weights,
      'sparsegen_gap': gap,
      'sparsegen_slack': 1 - sparsity,
    }
    return Routing(logits, weights, selects=True, aux=aux)

  def _sparsity(self, x: Array) -> Array:
    """l [b, t]."""
    inputs, size = x.shape[-1], self.hidden
    kernel = peft_param(
      self, 'hidden_kernel', kaiming_uniform(inputs), (inputs, size), 'ir'
    )
    bias = peft_param(self, 'hidden_bias', Constant(0), (size,), 'r')
    hidden = jax.nn.relu(gate_logits(x, kernel) + bias)
    kernel = peft_param(
      self, 'output_kernel', kaiming_uniform(size), (size,), 'r'
    )
    bias = peft_param(self, 'output_bias', Constant(-2.5), (), '')
    score = gate_logits(hidden, kernel[:, None])[..., 0] + bias
    return jax.nn.log_sigmoid(score) + (1 - EPSILON)


def sparsegen(z: Array, sparsity: Array) -> Array:
  """max(z - t, 0) / (1 - l), summing to one, [..., e] of l [..., 1] < 1."""
  # Differences alone matter; large logits would be rounded.
  z = z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
  order = jax.lax.stop_gradient(jnp.flip(jnp.sort(z, axis=-1), axis=-1))
  count = jnp.arange(1, z.shape[-1] + 1)
  total = 1 - sparsity
  size = jnp.sum(
    total + count * order > jnp.cumsum(order, axis=-1), axis=-1, keepdims=True
  )
  least = jnp.take_along_axis(order, jnp.maximum(size, 1) - 1, axis=-1)
  support = z >= least
  size = jnp.sum(support, axis=-1, keepdims=True)
  threshold = (
    jnp.sum(jnp.where(support, z, 0), axis=-1, keepdims=True) - total
  ) / size
  return jnp.maximum(z - threshold, 0) / total


def lower_bound(z: Array, k: int) -> Array:
  """The least l [...] with which sparsegen of z [..., e] has k experts at most.

  Without a gradient; -inf where there are no more experts than k.
  """
  z = jax.lax.stop_gradient(z)
  if z.shape[-1] <= k:
    return jnp.full(z.shape[:-1], -jnp.inf)
  top, _ = jax.lax.top_k(z, k + 1)
  bound = 1 - jnp.sum(top[..., :k] - top[..., k:], axis=-1)
  return jnp.where(jnp.isfinite(top[..., k]), bound, -jnp.inf)


def sparsegen_balance(sums: RouterStats) -> Array:
  """e * sum_e f_e P_e, P being the mean weight.

  f is an expert's share of all that are chosen, whose number differs by token.
  Source: the released code, LoadBalancingLoss.
  """
  chosen = jnp.sum(sums.share, axis=-1, keepdims=True)
  share = sums.share / jnp.maximum(chosen, 1)
  mean = sums.aux['sparsegen_weight'] / jnp.maximum(sums.count, 1)[..., None]
  return jnp.mean(sums.experts * jnp.sum(share * mean, axis=-1))


def sparsegen_gap(sums: RouterStats) -> Array:
  """The mean of relu(the least l for TARGET experts - l).

  Source: the paper's sparsity loss; the released code, RegularizationLoss.
  """
  return jnp.mean(sums.aux['sparsegen_gap'] / jnp.maximum(sums.count, 1))


def sparsegen_slack(sums: RouterStats) -> Array:
  """The mean of 1 - l. Source: the released code, LamSparseLoss."""
  return jnp.mean(sums.aux['sparsegen_slack'] / jnp.maximum(sums.count, 1))


ROUTER = RouterSpec(
  Sparsegen,
  losses={
    'sparsegen_balance': RouterLoss(sparsegen_balance, ('sparsegen_weight',)),
    'sparsegen_gap': RouterLoss(sparsegen_gap, ('sparsegen_gap',)),
    'sparsegen_slack': RouterLoss(sparsegen_slack, ('sparsegen_slack',)),
  },
)
