# SPDX-License-Identifier: Apache-2.0
"""One expert a token, drawn in training: straight-through Gumbel-softmax."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import ScoreGate, straight_through
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class Gumbel(ScoreGate):
  """weights = 1 for one expert, with the gradient of softmax((x W + g) / t).

  In training g is Gumbel noise, so that an expert is drawn with its probability
  softmax(x W); otherwise the most probable one is taken. Source: Jang et al.,
  arXiv:1611.01144; a router of SMEAR's baselines (Muqeeth et al.,
  arXiv:2306.03745).

  Attributes:
    temperature: t; the smaller, the nearer the gradient is to that of a draw,
      and the larger its variance.
  """

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits = self.masked_logits(x, ctx)
    noisy = logits
    if ctx.train:
      noise = jax.random.gumbel(self.make_rng('router'), logits.shape)
      noisy += noise / self.temperature
    best = jnp.argmax(noisy, axis=-1)
    return Routing(logits, straight_through(softmax(noisy), best), k=1)


ROUTER = RouterSpec(Gumbel)
