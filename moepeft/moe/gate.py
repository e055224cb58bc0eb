# SPDX-License-Identifier: Apache-2.0
"""Functions for routers: the linear gate, its noise, top-k selection."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range
from moepeft.core.types import Array, Context
from moepeft.nn.initializers import Normal
from moepeft.nn.low_rank_matmul import low_rank_matmul
from moepeft.nn.numerics import to_f32

# The released code's initializer of router kernels.
INIT = Normal(0.02)
EXPERTS = Range(1, 65_536)
JITTER = Range(0, 1)
DROPOUT = Range(0, 1, below=True)


def gate_logits(x: Array, kernel: Array) -> Array:
  """x [..., d] times kernel [d, e] -> float32 [..., e], at full precision."""
  return low_rank_matmul(to_f32(x), to_f32(kernel), jax.lax.Precision.HIGHEST)


def mask_experts(logits: Array, ctx: Context) -> Array:
  """The logits [..., e], with -inf for experts that the layer does not have.

  Every router calls it before selection. If layers have different numbers of
  experts, all of them compute the largest number.
  """
  if ctx.expert_mask is None:
    return logits
  return jnp.where(ctx.expert_mask, logits, -jnp.inf)


def jitter_input(
  module: nn.Module, x: Array, jitter: float, ctx: Context
) -> Array:
  """x times uniform noise in [1 - jitter, 1 + jitter], in training only.

  Source: Switch Transformer (arXiv:2101.03961), section 2.2. The released code
  has the noise in evaluation too.
  """
  if not ctx.train or jitter == 0:
    return x
  x = to_f32(x)
  rng = module.make_rng('router')
  return x * jax.random.uniform(
    rng, x.shape, minval=1 - jitter, maxval=1 + jitter
  )


def expert_dropout(
  module: nn.Module, logits: Array, rate: float, ctx: Context
) -> Array:
  """Removes each expert of a token with probability `rate`, in training only.

  The token's best expert always stays, so that the weights still sum to one.
  Source: expert dropout in SMEAR (arXiv:2306.03745), here per token.
  """
  if not ctx.train or rate == 0:
    return logits
  keep = jax.random.bernoulli(module.make_rng('router'), 1 - rate, logits.shape)
  keep |= logits >= jnp.max(logits, axis=-1, keepdims=True)
  return jnp.where(keep, logits, -1e9)


def top_mask(x: Array, k: int) -> Array:
  """bool [..., e]: the k largest in the last axis; the first of equal ones."""
  _, index = jax.lax.top_k(x, k)
  return jnp.sum(jax.nn.one_hot(index, x.shape[-1]), axis=-2) > 0
