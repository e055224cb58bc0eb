# SPDX-License-Identifier: Apache-2.0
"""Routing by token and by prompt, mixed with a weight of each layer: HMoRA."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.aux_losses import BALANCE, CERTAINTY, divergence_gap
from moepeft.moe.gate import (
  EXPERTS,
  align,
  check_k,
  example_ids,
  example_sums,
  gate_logits,
  mask_experts,
  top_mask,
)
from moepeft.moe.router import RouterLoss, RouterSpec
from moepeft.moe.router_stats import RouterStats
from moepeft.moe.routers.sentence import prompt_mean
from moepeft.nn.initializers import Constant, kaiming_uniform, peft_param
from moepeft.nn.numerics import softmax

_WEIGHT = Range(-1_000, 1_000)


class Hybrid(nn.Module):
  """weights = (1 - a) softmax(x W + b) + a softmax(m V + c).

  m is the mean of x over the prompt, and a the weight of layer l of L:
  sigmoid(epsilon (2 l / (L - 1) - 1) + shift + d), d being learned. Low layers
  route by the token, high ones by the prompt. With k, the weights are the
  softmax of the k largest of these, as they are.

  Source: HMoRA (Liao et al., ICLR 2025, openreview lTkHiXeuDl) and its released
  code. There m is the output of a transformer layer over the prompt's
  embeddings, which is trained with the routers and serves the whole network.

  Parameters: kernel, prompt_kernel [i, e]; bias, prompt_bias [e]; depth [], d.
  Kernels and biases are drawn as by torch.nn.Linear.

  Attributes:
    experts: e; k: the number of experts per token, 0 for all.
    epsilon, shift: of the layers' weights.
  """

  experts: int = option(1, EXPERTS)
  k: int = option(0, Range(0, 65_536))
  epsilon: float = option(2.0, _WEIGHT)
  shift: float = option(0.0, _WEIGHT)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    ids = example_ids(x, ctx)
    token = self._logits('', x, ctx)
    prompt = self._logits('prompt_', prompt_mean(self, x, ids, ctx), ctx)
    prompt = jnp.broadcast_to(prompt, token.shape)
    a = self._layer_weight(ctx)
    p, q = softmax(token), softmax(prompt)
    weights = (1 - a) * p + a * q
    if self.k:
      check_k('hybrid', self.k, self.experts)
      weights = softmax(jnp.where(top_mask(weights, self.k), weights, -jnp.inf))
    # Summed over an example's tokens it is one.
    size = example_sums(jnp.ones((*ids.shape, 1)), ids)[..., 0]
    share = align(1 / jnp.maximum(size, 1), p)
    aux = {
      'token_probability': p,
      'token_entropy': _entropy(p, token, ctx),
      'prompt_probability': share * q,
      'prompt_entropy': share[..., 0] * _entropy(q, prompt, ctx),
      'prompts': jnp.broadcast_to(share[..., 0], p.shape[:-1]),
    }
    return Routing(token, weights, k=self.k or None, aux=aux)

  def _logits(self, prefix: str, x: Array, ctx: Context) -> Array:
    """float32 [..., e] of x [..., i]."""
    size, e = x.shape[-1], self.experts
    init = kaiming_uniform(size)
    kernel = peft_param(self, f'{prefix}kernel', init, (size, e), 'ie')
    bias = peft_param(self, f'{prefix}bias', init, (e,), 'e')
    return mask_experts(gate_logits(x, kernel) + bias, ctx)

  def _layer_weight(self, ctx: Context) -> Array:
    """a []; the middle layer's outside of a stack."""
    depth = peft_param(self, 'depth', Constant(0), (), '')
    place = 0.5
    if ctx.layer is not None:
      place = ctx.layer / max(ctx.layer_count - 1, 1)
    return jax.nn.sigmoid(self.epsilon * (2 * place - 1) + self.shift + depth)


def _entropy(p: Array, logits: Array, ctx: Context) -> Array:
  """[...]: H(p) in nats, at least CERTAINTY ln e."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  experts = jnp.float32(p.shape[-1])
  if ctx.expert_mask is not None:
    log_p = jnp.where(ctx.expert_mask, log_p, 0)
    experts = jnp.sum(ctx.expert_mask).astype(jnp.float32)
  return jnp.maximum(-jnp.sum(p * log_p, axis=-1), CERTAINTY * jnp.log(experts))


def token_js(sums: RouterStats) -> Array:
  """`generalized_js` of the tokens' routing alone, bounded as in the code."""
  aux = sums.aux
  return divergence_gap(
    aux['token_probability'],
    aux['token_entropy'],
    sums.count,
    sums.experts,
    BALANCE,
  )


def prompt_js(sums: RouterStats) -> Array:
  """The same of the examples' routing, each example counting once."""
  aux = sums.aux
  return divergence_gap(
    aux['prompt_probability'],
    aux['prompt_entropy'],
    aux['prompts'],
    sums.experts,
    BALANCE,
  )


ROUTER = RouterSpec(
  Hybrid,
  pools_prompt=True,
  losses={
    'token_js': RouterLoss(token_js, ('token_probability', 'token_entropy')),
    'prompt_js': RouterLoss(
      prompt_js, ('prompt_probability', 'prompt_entropy')
    ),
  },
)
