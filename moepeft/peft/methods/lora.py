# SPDX-License-Identifier: Apache-2.0
"""LoRA (Hu et al., arXiv:2106.09685): y = f(x) + alpha / r (x A) B."""

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
    inside, outside = shapes(f, 'lora')
    a = peft_param(self, 'a', INIT_A, (*inside, self.rank), f'{f.input_axes}r')
    b = peft_param(
      self, 'b', INIT_B, (self.rank, *outside), f'r{f.output_axes}'
    )
    y = f(x)
    drop = nn.Dropout(self.dropout)
    x = drop(x, deterministic=not ctx.train).astype(y.dtype)
    return y + up(down(x, a) * self.scale, b)

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
  merge=merge,
  size_option='rank',
  exact_identity=True,
)
