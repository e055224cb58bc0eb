# SPDX-License-Identifier: Apache-2.0
"""Top-k routing with trained noise: Shazeer et al., 2017."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS, LinearGate, check_k, gate_logits, top_mask
from moepeft.moe.router import RouterSpec
from moepeft.nn.initializers import Constant, peft_param
from moepeft.nn.numerics import softmax


class NoisyTopK(LinearGate):
  """weights = softmax over the k largest of x W + N(0, 1) softplus(x W_noise).

  The noise is of training alone. Source: Shazeer et al., arXiv:1701.06538,
  equations 3 to 5. With k = 1 the weight is 1, without a gradient.

  Parameters: kernel [i, e]; noise_kernel [i, e], zero at first, as in the
  paper.

  Attributes:
    k: how many of its experts a token uses.
  """

  k: int = option(2, EXPERTS)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    check_k('noisy_topk', self.k, self.experts)
    logits, noisy = self.logits(x, ctx)
    shape = (x.shape[-1], self.experts)
    kernel = peft_param(self, 'noise_kernel', Constant(0), shape, 'ie')
    if ctx.train:
      noise = jax.random.normal(self.make_rng('router'), logits.shape)
      noisy += noise * jax.nn.softplus(gate_logits(x, kernel))
    chosen = jnp.where(top_mask(noisy, self.k), noisy, -jnp.inf)
    return Routing(logits, softmax(chosen), k=self.k)


ROUTER = RouterSpec(NoisyTopK)
