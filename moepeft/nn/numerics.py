# SPDX-License-Identifier: Apache-2.0
"""Softmax, casts and sums in at least float32."""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array


@jax.custom_vjp
def softmax(x: Array) -> Array:
  """Softmax over the last axis, which saves only its result for the gradient.

  With automatic differentiation, the division would save two more arrays of
  this size. It is for reverse mode only: `jax.jvp` is an error.
  """
  e = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
  return e / jnp.sum(e, axis=-1, keepdims=True)


def _softmax_forward(x):
  p = softmax(x)
  return p, p


def _softmax_backward(p, dp):
  return (p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def to_f32(x: Array) -> Array:
  """Casts x to float32, unless it is wider (float64 in tests)."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def einsum_f32(eqn: str, x: Array, y: Array) -> Array:
  """einsum(eqn, x, y) with sums and result in at least float32."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(eqn, x, y, preferred_element_type=dtype)
