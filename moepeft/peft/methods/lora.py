# SPDX-License-Identifier: Apache-2.0
"""LoRA (Hu et al., arXiv:2106.09685): y = f(x) + alpha / r (x A) B."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import (
  BaseLayer,
  contraction,
  flatten_features,
  kernel_letters,
  sizes,
)
from moepeft.nn.initializers import Constant, Normal, peft_param
from moepeft.nn.low_rank_matmul import low_rank_matmul
from moepeft.nn.numerics import to_f32
from moepeft.peft.method import Method

INIT_A = Normal(0.02)
INIT_B = Constant(0)
RANK = Range(1, 65_536)
ALPHA = Range(0, 1_000_000)
DROPOUT = Range(0, 1, below=True)


def down(x: Array, a: Array) -> Array:
  """x A: [b, t, *in] and [*in, ...] -> [b, t, ...], in x's dtype."""
  rank = a.shape[x.ndim - 2 :]
  x = flatten_features(x)
  flat = a.astype(x.dtype).reshape(x.shape[-1], -1)
  return low_rank_matmul(x, flat).reshape(*x.shape[:2], *rank)


def up(z: Array, b: Array) -> Array:
  """z B: [b, t, ...] and [..., *out] -> [b, t, *out], in z's dtype."""
  out = b.shape[z.ndim - 2 :]
  z = flatten_features(z)
  flat = b.astype(z.dtype).reshape(z.shape[-1], -1)
  return low_rank_matmul(z, flat).reshape(*z.shape[:2], *out)


def shapes(f: BaseLayer, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The input's and the output's feature shapes at a projection.

  Raises:
    ValueError: the site has no weight to stand beside.
  """
  if f.eqn is None:
    raise ValueError(
      f'{name} needs sites with a projection (like */q or */wo); '
      'change its option `sites`'
    )
  _, inner, outer, _ = contraction(f.eqn)
  size = sizes(f.eqn, f.shape)
  return tuple(size[c] for c in inner), tuple(size[c] for c in outer)


class Lora(nn.Module):
  """A low-rank term beside a projection; the base's function at first.

  Parameters: a [*in, r] ~ N(0, 0.02^2), b [r, *out] zeros (the released
  code's initialisers), float32, computed in x's dtype.

  Attributes:
    rank: r.
    alpha: the term is scaled by alpha / r (16 in the released code).
    rslora: scale by alpha / sqrt(r) instead (arXiv:2312.03732).
    dropout: of the term's input, in training.
  """

  rank: int = option(4, RANK)
  alpha: float = option(16.0, ALPHA)
  rslora: bool = False
  dropout: float = option(0.0, DROPOUT, training_only=True)

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    if jnp.issubdtype(x.dtype, jnp.integer):
      return self._of_table(f, x)
    y = f(x)
    return y + self.term(self, f, x, y.dtype, ctx)

  @nn.nowrap
  def mix(
    self,
    module: nn.Module,
    f: BaseLayer,
    x: Array,
    weights: Array,
    ctx: Context,
    share: str,
  ) -> Array:
    """f(x) + scale sum_e p_e (x A_e) B_e.

    The weights act in rank space: p weights x A, and (e, r) is contracted with
    B in one product. It equals mixing the experts' outputs, as the released
    code does, and never builds [b, t, e, out].

    Parameters: a [*in, e, r], b [e, r, *out]; a shared one has no e.
    """
    y = f(x)
    return y + self.term(module, f, x, y.dtype, ctx, weights, share)

  @nn.nowrap
  def term(
    self,
    module: nn.Module,
    f: BaseLayer,
    x: Array,
    dtype: Any,
    ctx: Context,
    weights: Array | None = None,
    share: str = '',
  ) -> Array:
    """The low-rank term in `dtype`, of one adapter or of weighted experts.

    Args:
      module: owns the parameters.
      weights: [b, t, e]; None for one adapter.
      share: 'a' or 'b' where the experts have it in common.
    """
    inside, outside = shapes(f, module.name or 'lora')
    e = () if weights is None else weights.shape[-1:]
    e_of = {name: () if share == name else e for name in 'ab'}
    shape_a = (*inside, *e_of['a'], self.rank)
    shape_b = (*e_of['b'], self.rank, *outside)
    axes_a, axes_b = ('er' if e_of[name] else 'r' for name in 'ab')
    a = peft_param(module, 'a', INIT_A, shape_a, f'{f.input_axes}{axes_a}')
    b = peft_param(module, 'b', INIT_B, shape_b, f'{axes_b}{f.output_axes}')
    drop = nn.Dropout(self.dropout)
    z = down(drop(x, deterministic=not ctx.train).astype(dtype), a)
    if weights is None:
      z = z * self.scale
    else:
      if share == 'a':
        z = z[..., None, :]
      z = z * (weights * self.scale)[..., None].astype(dtype)
      if share == 'b':
        z = jnp.sum(z, axis=-2)
    return up(z, b)

  def _of_table(self, f: BaseLayer, ids: Array) -> Array:
    """At an embedding: y = table[ids] + alpha / r A[ids] B, a [v, r]."""
    vocab, width = f.shape
    a = peft_param(self, 'a', INIT_A, (vocab, self.rank), 'vr')
    b = peft_param(self, 'b', INIT_B, (self.rank, width), 'rd')
    y = f(ids)
    rows = jnp.take(a, ids, axis=0).astype(y.dtype)
    return y + up(rows * self.scale, b)

  @property
  def scale(self) -> float:
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def merge(variables, kernel: Array, *, adapter: Lora, eqn: str) -> Array:
  """The kernel with the term added: W + scale A B, in float32."""
  term = product(variables['a'], variables['b'], eqn)
  return to_f32(kernel) + adapter.scale * term


def product(a: Array, b: Array, eqn: str) -> Array:
  """A B with the axes of the kernel of `eqn`."""
  _, inner, outer, _ = contraction(eqn)
  return jnp.einsum(f'{inner}r,r{outer}->{kernel_letters(eqn)}', a, b)


_PROJECTIONS = ('query', 'key', 'value', 'output', 'gate', 'down')

METHOD = Method(
  module=Lora,
  # The released code leaves wi_1 alone.
  roles={'official': _PROJECTIONS, 'paper': (*_PROJECTIONS, 'up')},
  additive=True,
  shareable=('a', 'b'),
  merge=merge,
  size_option='rank',
  exact_identity=True,
)
