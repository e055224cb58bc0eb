# SPDX-License-Identifier: Apache-2.0
"""Products with trained low-rank kernels, with fast gradients on CPU.

Axes: i in, o out; one of them is small (a rank, experts).
"""

import functools

import jax
import jax.numpy as jnp

from moepeft.core.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def low_rank_matmul(x: Array, kernel: Array, precision=None) -> Array:
  """x [..., i] times kernel [i, o] -> [..., o].

  The kernel's gradient is a product over all tokens. XLA puts its large operand
  first and, on CPU, transposes it and recomputes it element by element, at
  several times the cost of the product. This gradient puts the small operand
  first. It is for reverse mode only: `jax.jvp` is an error.

  Args:
    precision: as in `jnp.einsum`.
  """
  return jnp.einsum('...i,io->...o', x, kernel, precision=precision)


def _forward(x, kernel, precision):
  return low_rank_matmul(x, kernel, precision), (x, kernel)


def _backward(precision, residuals, dy):
  x, kernel = residuals
  einsum = functools.partial(jnp.einsum, precision=precision)
  dx = einsum('...o,io->...i', dy, kernel)
  x, dy = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
  if kernel.shape[0] < kernel.shape[1]:
    return dx, einsum('ti,to->io', x, dy)
  # Without the barrier, XLA's simplifier would swap the operands.
  transposed = jax.lax.optimization_barrier(einsum('to,ti->oi', dy, x))
  return dx, transposed.T


low_rank_matmul.defvjp(_forward, _backward)
