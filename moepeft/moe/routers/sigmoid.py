# SPDX-License-Identifier: Apache-2.0
"""A gate for each expert by itself: the experts do not compete."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate, gate_logits
from moepeft.moe.router import RouterSpec
from moepeft.nn.initializers import (
  Constant,
  Initializer,
  kaiming_uniform,
  peft_param,
)


class Sigmoid(LinearGate):
  """weights = sigmoid(x W), each between 0 and 1; they sum to anything.

  With `hidden` the logits are (silu(x G) * x U) W. With `max_threshold` each
  token has a threshold t = max_threshold * sigmoid(x w + b), and weights below
  it are zero; a token may have no expert, and then no adapter. The released
  code compares weights with thresholds, which has no gradient, so w and b stay
  as they were drawn here too.

  Source: the soft and the sparse mixture of heterogeneous adapters (MoA,
  arXiv:2506.05928).

  Parameters: kernel [i, e]. With `hidden`, m = hidden e: gate_kernel and
  up_kernel [i, m], kernel [m, e], and with `bias`, zero at first, gate_bias and
  up_bias [m]. With `max_threshold`: threshold_kernel [i], threshold_bias [],
  drawn as by torch.nn.Linear.

  Attributes:
    hidden: the hidden units for each expert; 0 for a linear router.
    max_threshold: the largest threshold; 0 for none.
  """

  hidden: int = option(0, Range(0, 65_536))
  max_threshold: float = option(0.0, Range(0, 1))

  @property
  def frozen_arrays(self) -> tuple[str, ...]:
    """Regular expressions of arrays that stay as they were drawn."""
    return ('threshold_',) if self.max_threshold else ()

  @nn.nowrap
  def scores(self, x: Array) -> Array:
    if not self.hidden:
      return super().scores(x)
    size = self.hidden * self.experts

    def projected(name: str) -> Array:
      y = gate_logits(x, self.input_kernel(x, size, 'ir', f'{name}_kernel'))
      if not self.bias:
        return y
      return y + peft_param(self, f'{name}_bias', Constant(0), (size,), 'r')

    hidden = jax.nn.silu(projected('gate')) * projected('up')
    return gate_logits(hidden, self.input_kernel(hidden, self.experts, 're'))

  @nn.nowrap
  def bias_init(self, x: Array) -> Initializer:
    return Constant(0) if self.hidden else super().bias_init(x)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    weights = jax.nn.sigmoid(noisy)
    if not self.max_threshold:
      return Routing(logits, weights)
    inputs = x.shape[-1]
    init = kaiming_uniform(inputs)
    kernel = peft_param(self, 'threshold_kernel', init, (inputs,), 'i')
    bias = peft_param(self, 'threshold_bias', init, (), '')
    score = gate_logits(x, kernel[:, None]) + bias
    threshold = self.max_threshold * jax.nn.sigmoid(score)
    weights = jnp.where(weights >= threshold, weights, 0)
    return Routing(logits, weights, selects=True)


ROUTER = RouterSpec(Sigmoid, normalized=False)
