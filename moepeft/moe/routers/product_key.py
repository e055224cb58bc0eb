# SPDX-License-Identifier: Apache-2.0
"""Logits that are sums of two scores, from two small tables: product keys."""

import math

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS, LinearGate, check_k, gate_logits, top_mask
from moepeft.moe.router import RouterSpec
from moepeft.nn.initializers import kaiming_uniform, peft_param
from moepeft.nn.numerics import softmax


class ProductKey(LinearGate):
  """weights = softmax over the k largest of s_i + t_j, expert e being (i, j).

  s = x U and t = x V have about sqrt(e) scores each: i = e // m and j = e % m,
  m columns of V. Source: Lample et al., arXiv:1907.05242, as a router in
  scalable-moe-lora (github.com/attrung), where each table reads all of x and
  not a half of a query. The k largest of all e sums are taken: where e is a
  product, they are among those of the k largest scores of each table.

  Parameters: kernel, U [i, ceil(sqrt(e))]; second_kernel, V [i, m].

  Attributes:
    k: the number of experts per token.
  """

  k: int = option(2, EXPERTS)

  @nn.nowrap
  def scores(self, x: Array) -> Array:
    rows = math.isqrt(self.experts - 1) + 1
    columns = -(-self.experts // rows)
    first = gate_logits(x, self.input_kernel(x, rows, 'ir'))
    inputs = x.shape[-1]
    init = kaiming_uniform(inputs)
    shape = (inputs, columns)
    kernel = peft_param(self, 'second_kernel', init, shape, 'ir')
    second = gate_logits(x, kernel)
    sums = first[..., :, None] + second[..., None, :]
    return sums.reshape(*x.shape[:-1], -1)[..., : self.experts]

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    check_k('product_key', self.k, self.experts)
    logits, noisy = self.logits(x, ctx)
    chosen = jnp.where(top_mask(noisy, self.k), noisy, -jnp.inf)
    return Routing(logits, softmax(chosen), k=self.k)


ROUTER = RouterSpec(ProductKey)
