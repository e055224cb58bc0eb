# SPDX-License-Identifier: Apache-2.0
"""One routing for each example, from the mean over its prompt: SMEAR."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import (
  DROPOUT,
  EXPERTS,
  align,
  example_ids,
  expert_dropout,
  gate_logits,
  mask_experts,
)
from moepeft.moe.router import RouterSpec
from moepeft.nn.initializers import Constant, Normal, peft_param
from moepeft.nn.norms import layer_norm
from moepeft.nn.numerics import softmax, to_f32

# The released code's `router_init_scale`.
SCALE = 0.01
# That of torch.nn.LayerNorm.
EPSILON = 1e-5


class Sentence(nn.Module):
  """weights = softmax(LN(m) . LN(W)), m being the mean over the prompt.

  All tokens of an example have the same weights; with combine='parameters' its
  experts are merged into one, as in the paper. Source: SMEAR (Muqeeth et al.,
  arXiv:2306.03745) and its released code, which takes the mean over padding
  too, and has a bias in LN(W): it adds the same to all logits, and is left out.

  Parameters: kernel [i, e]; scale, bias [i] of LN(m); kernel_scale [i] of
  LN(W), which is over each expert's column.

  Attributes:
    experts: e; dropout: of experts, for each example; see `expert_dropout`.
  """

  experts: int = option(1, EXPERTS)
  dropout: float = option(0.0, DROPOUT, training_only=True)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    size = x.shape[-1]
    kernel = peft_param(
      self, 'kernel', Normal(SCALE), (size, self.experts), 'ie'
    )
    kernel_scale = peft_param(
      self, 'kernel_scale', Constant(SCALE), (size,), 'i'
    )
    scale = peft_param(self, 'scale', Constant(1), (size,), 'i')
    bias = peft_param(self, 'bias', Constant(0), (size,), 'i')
    ids = example_ids(x, ctx)
    mean = layer_norm(prompt_mean(self, x, ids, ctx), scale, bias, EPSILON)
    columns = layer_norm(kernel.T, kernel_scale, jnp.float32(0), EPSILON).T
    logits = mask_experts(gate_logits(mean, columns), ctx)
    logits = jnp.broadcast_to(logits, (*x.shape[:-1], self.experts))
    noisy = expert_dropout(self, logits, self.dropout, ctx, ids)
    return Routing(logits, softmax(noisy))


def prompt_mean(router: nn.Module, x: Array, ids: Array, ctx: Context) -> Array:
  """The mean of x [b, t, ..., i] over the prompt of each token's example.

  Its axis t has size 1 where a row is one example. In a cached call it is that
  of an earlier call with the prompt, unless this call has the prompt.

  Args:
    router: has the mean in its collection 'cache'.
    ids: from `example_ids`.

  Raises:
    ValueError: the batch does not say what the prompt is.
  """
  if ctx.prompt_mask is None:
    raise ValueError(
      'a router reads the prompt, and the batch does not say what is trained '
      "('targets_mask'); give it, or use another router"
    )
  prompt = ctx.prompt_mask & (ids > 0)
  x = jnp.where(align(prompt, x), to_f32(x), 0)
  if ctx.segment_ids is None:
    total = jnp.sum(x, axis=1, keepdims=True)
    count = jnp.sum(prompt, axis=1, keepdims=True)
  else:
    same = to_f32((ids[:, :, None] == ids[:, None, :]) & prompt[:, None])
    total = jnp.einsum(
      'bts,bs...->bt...', same, x, precision=jax.lax.Precision.HIGHEST
    )
    count = jnp.sum(same, axis=-1)
  mean = total / align(jnp.maximum(count, 1), total)
  if not ctx.decode:
    return mean
  cache = router.variable('cache', 'prompt_mean', jnp.zeros_like, mean)
  cache.value = jnp.where(align(count > 0, mean), mean, cache.value)
  return cache.value


ROUTER = RouterSpec(Sentence, pools_prompt=True)
