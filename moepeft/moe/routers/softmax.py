# SPDX-License-Identifier: Apache-2.0
"""The paper's router: every expert, weighted by a softmax (soft merging)."""

import flax.linen as nn

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import (
  DROPOUT,
  EXPERTS,
  INIT,
  JITTER,
  expert_dropout,
  gate_logits,
  jitter_input,
  mask_experts,
)
from moepeft.moe.router import RouterSpec
from moepeft.nn.initializers import peft_param
from moepeft.nn.numerics import softmax


class Softmax(nn.Module):
  """weights = softmax(x W); each row sums to one.

  Source: Zadouri et al., arXiv:2309.05444, equations of section 2; no bias,
  float32.

  Attributes:
    experts: e.
    jitter: the input noise in training; see `gate.jitter_input`.
    dropout: the rate of expert dropout in training; see `gate.expert_dropout`.
  """

  experts: int = option(1, EXPERTS)
  jitter: float = option(0.0, JITTER, training_only=True)
  dropout: float = option(0.0, DROPOUT, training_only=True)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    shape = (x.shape[-1], self.experts)
    kernel = peft_param(self, 'kernel', INIT, shape, 'ie')
    logits = gate_logits(jitter_input(self, x, self.jitter, ctx), kernel)
    logits = mask_experts(logits, ctx)
    noisy = expert_dropout(self, logits, self.dropout, ctx)
    return Routing(logits, softmax(noisy))


ROUTER = RouterSpec(Softmax)
