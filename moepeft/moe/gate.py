# SPDX-License-Identifier: Apache-2.0
"""Functions for routers: the linear gate, its noise, selection."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Choices, Range, option
from moepeft.core.types import Array, Context
from moepeft.nn.initializers import (
  Constant,
  Initializer,
  Normal,
  kaiming_uniform,
  peft_param,
)
from moepeft.nn.low_rank_matmul import low_rank_matmul
from moepeft.nn.numerics import to_f32

# The released code's initializer of router kernels.
INIT = Normal(0.02)
EXPERTS = Range(1, 65_536)
JITTER = Range(0, 1)
DROPOUT = Range(0, 1, below=True)
TEMPERATURE = Range(0, 1_000, above=True)
KERNEL_INITS = ('normal', 'kaiming', 'zeros')


class ScoreGate(nn.Module):
  """A router whose logits are scores of its input / temperature.

  The scores are x W; a subclass may replace `scores`. Parameters: kernel
  [i, e] and, where there is a bias, bias [e], float32.

  Attributes:
    experts: e.
    kernel_init: 'normal' draws W from N(0, 0.02^2), as the released code of
      arXiv:2309.05444; 'kaiming' from U(-1/sqrt(i), 1/sqrt(i)), as
      torch.nn.Linear, and with it most other released codes; 'zeros' leaves it
      zero.
    temperature: divides the logits.
    bias: whether the logits have one, drawn as by torch.nn.Linear with
      kernel_init='kaiming', else zero at first.
    jitter: of the input, in training; see `jitter_input`.
  """

  experts: int = option(1, EXPERTS)
  kernel_init: str = option('normal', Choices(KERNEL_INITS), training_only=True)
  temperature: float = option(1.0, TEMPERATURE)
  bias: bool = False
  jitter: float = option(0.0, JITTER, training_only=True)

  @nn.nowrap
  def scores(self, x: Array) -> Array:
    """float32 [b, t, e] of the input [b, t, i]."""
    return gate_logits(x, self.input_kernel(x, self.experts, 'ie'))

  @nn.nowrap
  def input_kernel(
    self, x: Array, outputs: int, axes: str, name: str = 'kernel'
  ) -> Array:
    """A parameter [i, outputs], drawn as `kernel_init` says."""
    inputs = x.shape[-1]
    init = {
      'normal': INIT,
      'kaiming': kaiming_uniform(inputs),
      'zeros': Constant(0),
    }[self.kernel_init]
    return peft_param(self, name, init, (inputs, outputs), axes)

  @nn.nowrap
  def bias_init(self, x: Array) -> Initializer:
    """The initializer of the parameter `bias`."""
    is_drawn = self.kernel_init == 'kaiming'
    return kaiming_uniform(x.shape[-1]) if is_drawn else Constant(0)

  @nn.nowrap
  def masked_logits(self, x: Array, ctx: Context) -> Array:
    """float32 [b, t, e], -inf for experts that the layer does not have."""
    scores = self.scores(jitter_input(self, x, self.jitter, ctx))
    if self.bias:
      init = self.bias_init(x)
      scores += peft_param(self, 'bias', init, (self.experts,), 'e')
    return mask_experts(scores / self.temperature, ctx)


class LinearGate(ScoreGate):
  """`ScoreGate` with expert dropout.

  Attributes:
    dropout: of experts, in training; see `expert_dropout`.
  """

  dropout: float = option(0.0, DROPOUT, training_only=True)

  @nn.nowrap
  def logits(self, x: Array, ctx: Context) -> tuple[Array, Array]:
    """(logits [b, t, e], the same after expert dropout).

    Both are -inf for experts that the layer does not have.
    """
    logits = self.masked_logits(x, ctx)
    return logits, expert_dropout(self, logits, self.dropout, ctx)


def check_k(name: str, k: int, experts: int) -> None:
  """Raises a ValueError unless a router can choose k of its experts."""
  if not 1 <= k <= experts:
    raise ValueError(f'{name} needs 1 <= k <= experts; got k={k} of {experts}')


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


def example_ids(x: Array, ctx: Context) -> Array:
  """int32 [b, t]: each token's example in its row, from 1; 0 on padding.

  Args:
    x: what the router reads, [b, t, ...].
  """
  ids = ctx.segment_ids
  if ids is None:
    ids = jnp.ones(x.shape[:2], jnp.int32)
  return ids if ctx.token_mask is None else jnp.where(ctx.token_mask, ids, 0)


def align(a: Array, x: Array) -> Array:
  """An array [b, t] with axes of size 1 behind, as many as x [b, t, ...] has.

  Routers of MoV's heads read [b, t, heads, i].
  """
  return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def same_in_example(draws: Array, ids: Array) -> Array:
  """Draws [b, t, ...], those of one token for all tokens of its example.

  Args:
    ids: from `example_ids`.
  """
  # A row has at most as many examples as tokens.
  index = align(jnp.maximum(ids - 1, 0), draws)
  return jnp.take_along_axis(draws, index, axis=1)


def example_sums(array: Array, ids: Array) -> Array:
  """[b, t, e]: each token's sum over its example, by `example_ids`."""
  examples = ids.shape[1] + 1

  def of_row(array, ids):
    return jax.ops.segment_sum(array, ids, examples)[ids]

  return jax.vmap(of_row)(array, ids)


def jitter_input(
  module: nn.Module, x: Array, jitter: float, ctx: Context
) -> Array:
  """x times uniform noise in [1 - jitter, 1 + jitter], in training only.

  Source: Switch Transformer (arXiv:2101.03961). The released code has the noise
  in evaluation too.
  """
  if not ctx.train or jitter == 0:
    return x
  x = to_f32(x)
  rng = module.make_rng('router')
  return x * jax.random.uniform(
    rng, x.shape, minval=1 - jitter, maxval=1 + jitter
  )


def expert_dropout(
  module: nn.Module,
  logits: Array,
  rate: float,
  ctx: Context,
  ids: Array | None = None,
) -> Array:
  """Removes each expert of a token with probability `rate`, in training only.

  The token's best expert always stays, so that the weights still sum to one.
  Source: expert dropout in SMEAR (arXiv:2306.03745), here per token.

  Args:
    ids: from `example_ids`, to draw per example instead of per token.
  """
  if not ctx.train or rate == 0:
    return logits
  keep = jax.random.bernoulli(module.make_rng('router'), 1 - rate, logits.shape)
  if ids is not None:
    keep = same_in_example(keep, ids)
  keep |= logits >= jnp.max(logits, axis=-1, keepdims=True)
  return jnp.where(keep, logits, -1e9)


def top_mask(x: Array, k: int) -> Array:
  """bool [..., e]: the k largest in the last axis; the first of equal ones."""
  _, index = jax.lax.top_k(x, k)
  return jnp.sum(jax.nn.one_hot(index, x.shape[-1]), axis=-2) > 0


def sorted_mass(p: Array) -> tuple[Array, Array]:
  """(mass, rank) [..., e] of probabilities sorted from the largest down.

  mass is the sum up to an expert and with it, rank counts from 0; ties go to
  the first.
  """
  order = jnp.argsort(p, axis=-1, stable=True, descending=True)
  rank = jnp.argsort(order, axis=-1)
  sums = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1)
  return jnp.take_along_axis(sums, rank, axis=-1), rank


def normalize(x: Array) -> Array:
  """x divided by its sum over the last axis; zeros if the sum is 0."""
  total = jnp.sum(x, axis=-1, keepdims=True)
  return x / jnp.where(total == 0, 1, total)


def straight_through(p: Array, index: Array) -> Array:
  """One at `index` [...], zero elsewhere, with the gradient of p [..., e]."""
  # The difference is zero, and not rounded into the sum.
  hard = jax.nn.one_hot(index, p.shape[-1], dtype=p.dtype)
  return hard + (p - jax.lax.stop_gradient(p))
