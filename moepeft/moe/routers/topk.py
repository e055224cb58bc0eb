# SPDX-License-Identifier: Apache-2.0
"""Sparse routing: the k most probable experts (Shazeer et al., 2017)."""

import flax.linen as nn
import jax.numpy as jnp

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
  top_mask,
)
from moepeft.moe.router import RouterSpec
from moepeft.nn.initializers import peft_param
from moepeft.nn.numerics import softmax


class TopK(nn.Module):
  """weights = softmax(x W) on the k largest, zero elsewhere.

  With `renormalize`, a row sums to one. Otherwise it sums to the k largest
  probabilities (the released code), initially about k / e, so that a mixture of
  vectors does not start at the base model. The semantics sets the default.

  Attributes:
    experts: e.
    k: the number of experts per token.
    renormalize: whether the k probabilities are scaled to sum to one.
    jitter, dropout: as in `Softmax`.
  """

  experts: int = option(1, EXPERTS)
  k: int = option(1, EXPERTS)
  renormalize: bool = False
  jitter: float = option(0.0, JITTER, training_only=True)
  dropout: float = option(0.0, DROPOUT, training_only=True)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    if not 1 <= self.k <= self.experts:
      raise ValueError(
        f'topk needs 1 <= k <= experts; got k={self.k} of {self.experts}'
      )
    shape = (x.shape[-1], self.experts)
    kernel = peft_param(self, 'kernel', INIT, shape, 'ie')
    logits = gate_logits(jitter_input(self, x, self.jitter, ctx), kernel)
    logits = mask_experts(logits, ctx)
    noisy = expert_dropout(self, logits, self.dropout, ctx)
    probabilities = softmax(noisy)
    weights = jnp.where(top_mask(probabilities, self.k), probabilities, 0)
    if self.renormalize:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(logits, weights, k=self.k)


ROUTER = RouterSpec(
  TopK,
  normalized=False,
  defaults={
    'official': {'renormalize': False},
    'paper': {'renormalize': True},
  },
)
