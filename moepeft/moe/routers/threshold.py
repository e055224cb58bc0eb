# SPDX-License-Identifier: Apache-2.0
"""Experts above a learned threshold: AdaMoLE's router."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate, gate_logits, normalize
from moepeft.moe.router import RouterLoss, RouterSpec
from moepeft.moe.router_stats import RouterStats
from moepeft.nn.initializers import kaiming_uniform, peft_param
from moepeft.nn.numerics import softmax


class Threshold(LinearGate):
  """weights = relu(p - t) over their sum; p = softmax(x W).

  Each token has its own threshold t = max_threshold * sigmoid(x w + b). With
  the default maximum of 1 / e the most probable expert is always above it; with
  a larger one a token may have no expert, and then no adapter.

  Source: AdaMoLE (Liu and Luo, arXiv:2405.00361) and its released code.

  Parameters: kernel [i, e]; threshold_kernel [i], threshold_bias [], drawn as
  by torch.nn.Linear.

  Attributes:
    max_threshold: the largest threshold; 0 for 1 / e.
  """

  max_threshold: float = option(0.0, Range(0, 1))

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    inputs = x.shape[-1]
    logits, noisy = self.logits(x, ctx)
    init = kaiming_uniform(inputs)
    kernel = peft_param(self, 'threshold_kernel', init, (inputs,), 'i')
    bias = peft_param(self, 'threshold_bias', init, (), '')
    available = jnp.isfinite(logits)
    largest = self.max_threshold or 1 / jnp.sum(available, -1, keepdims=True)
    threshold = largest * jax.nn.sigmoid(gate_logits(x, kernel[:, None]) + bias)
    margin = jnp.where(available, softmax(noisy) - threshold, 0)
    return Routing(
      logits,
      normalize(jnp.maximum(margin, 0)),
      selects=True,
      aux={
        'selected': (margin >= 0) & available,
        'margin': margin,
      },
    )


def threshold_balance(sums: RouterStats) -> Array:
  """e * sum_e f_e P_e, P being the mean of p - t, which may be negative.

  f is the share of the tokens that select an expert. Source: AdaMoLE's
  released code, AdaMoeLayer.get_layer_loss; the paper's text has the mean of p.
  """
  count = jnp.maximum(sums.count, 1)[..., None]
  products = (sums.aux['selected'] / count) * (sums.aux['margin'] / count)
  return jnp.mean(sums.experts * jnp.sum(products, axis=-1))


ROUTER = RouterSpec(
  Threshold,
  losses={
    'threshold_balance': RouterLoss(threshold_balance, ('selected', 'margin'))
  },
)
