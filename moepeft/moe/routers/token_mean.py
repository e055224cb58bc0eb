# SPDX-License-Identifier: Apache-2.0
"""One routing for each example, the mean of its tokens': Lily in peft."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import (
  LinearGate,
  align,
  example_ids,
  example_sums,
)
from moepeft.moe.router import RouterSpec
from moepeft.nn.numerics import softmax


class TokenMean(LinearGate):
  """weights = the mean of softmax(x W) over the tokens of an example.

  Later tokens count too, so it is for encoders. Source: Lily (Zhong et al.,
  arXiv:2407.09946) in its released code and in peft, which take the mean over
  the whole batch, padding included.
  """

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    ids = example_ids(x, ctx)
    size = example_sums(jnp.ones((*ids.shape, 1)), ids)[..., 0]
    weights = example_sums(softmax(noisy), ids)
    return Routing(logits, weights / align(size, weights))


ROUTER = RouterSpec(TokenMean, causal=False)
