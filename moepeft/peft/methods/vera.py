# SPDX-License-Identifier: Apache-2.0
"""VeRA (Kopiczko et al., arXiv:2310.11454): vectors between random matrices.

The matrices A and B are frozen and shared: sites of equal inputs have one A, of
equal outputs one B. Both are functions of a seed, computed where they are used,
so that neither memory nor files hold them.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import MAX_SEED, Range, option
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer, contraction, sizes
from moepeft.nn.initializers import Constant, peft_param
from moepeft.nn.numerics import to_f32
from moepeft.peft import low_rank
from moepeft.peft.method import Method


class Vera(nn.Module):
  """y = f(x) + (((x A) * d) B) * b; the base's function at first, as b is zero.

  A [in, r] is from U(-sqrt(6 / in), sqrt(6 / in)) and B [r, out] from
  U(-sqrt(6 / r), sqrt(6 / r)), as in peft.

  Parameters: d [r], b [*out] zeros, float32.

  Attributes:
    rank: r.
    d_initial: the initial value of d.
    seed: of A and B.
    dropout: of the term's input, in training.
  """

  rank: int = option(256, low_rank.RANK)
  d_initial: float = option(0.1, Range(-1_000, 1_000), training_only=True)
  seed: int = option(0, Range(0, MAX_SEED))
  dropout: float = option(0.0, low_rank.DROPOUT, training_only=True)

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    inside, outside = low_rank.shapes(f, 'vera')
    d = peft_param(self, 'd', Constant(self.d_initial), (self.rank,), 'r')
    b = peft_param(self, 'b', Constant(0), outside, f.output_axes)
    matrix_a, matrix_b = self.matrices(inside, outside)
    y = f(x)
    drop = nn.Dropout(self.dropout)
    x = drop(x, deterministic=not ctx.train).astype(y.dtype)
    z = low_rank.down(x, matrix_a) * d.astype(y.dtype)
    return y + low_rank.up(z, matrix_b) * b.astype(y.dtype)

  @nn.nowrap
  def matrices(
    self, inside: tuple[int, ...], outside: tuple[int, ...]
  ) -> tuple[Array, Array]:
    """A [*in, r] and B [r, *out], float32."""
    inputs, outputs = math.prod(inside), math.prod(outside)
    a = uniform(self.seed, 0, inputs, self.rank) * (6 / inputs) ** 0.5
    b = uniform(self.seed, 1, outputs, self.rank) * (6 / self.rank) ** 0.5
    return a.reshape(*inside, -1), b.T.reshape(-1, *outside)


def uniform(seed: int, matrix: int, rows: int, columns: int) -> Array:
  """Numbers of U(-1, 1), float32 [rows, columns].

  An entry depends on the seed, the matrix and its row and column alone: a
  smaller matrix is the corner of a larger one. The hash of integers is the same
  on all devices and in all versions.
  """
  seeds = _hash(jnp.array([seed, matrix], jnp.uint32))
  by_row = _hash(jnp.arange(rows, dtype=jnp.uint32) + seeds[0])
  by_column = _hash(jnp.arange(columns, dtype=jnp.uint32) ^ seeds[1])
  bits = _hash(by_row[:, None] + by_column)
  # float32 has 24 bits.
  return to_f32(bits >> 8) * 2**-23 - 1


def _hash(x: Array) -> Array:
  """Mixes the bits of uint32. Source: lowbias32 of github.com/skeeto."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def merge(variables, kernel: Array, *, adapter: Vera, eqn: str) -> Array:
  """W + (A d) (B b), in float32."""
  _, inner, outer, _ = contraction(eqn)
  size = sizes(eqn, kernel.shape)
  a, b = adapter.matrices(*(tuple(size[c] for c in s) for s in (inner, outer)))
  term = low_rank.product(a * variables['d'], b * variables['b'], eqn)
  return to_f32(kernel) + term


_ROLES = ('query', 'value')

METHOD = Method(
  module=Vera,
  roles={'official': _ROLES, 'paper': _ROLES},
  additive=True,
  merge=merge,
  scaled_leaves=(),
  exact_identity=True,
)
