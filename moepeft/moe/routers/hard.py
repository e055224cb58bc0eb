# SPDX-License-Identifier: Apache-2.0
"""Exactly one expert a token, at full weight."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import ScoreGate, straight_through
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class Hard(ScoreGate):
  """weights = 1 for the most probable expert, the gradient softmax(x W)'s.

  The expert acts as it would alone, in training and after. Source: Hard-Routed
  MoR-LoRA (arXiv:2606.31413); the estimator is Bengio et al.'s
  (arXiv:1308.3432). Expert dropout would do nothing: it leaves the best expert.
  """

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits = self.masked_logits(x, ctx)
    best = jnp.argmax(logits, axis=-1)
    return Routing(logits, straight_through(softmax(logits), best), k=1)


ROUTER = RouterSpec(Hard)
