# SPDX-License-Identifier: Apache-2.0
"""Softmax, casts and sums in float32 at least."""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array


@jax.custom_vjp
def softmax(x: Array) -> Array:
  """Over the last axis; its gradient keeps the result and nothing else.

  Derived by `jax.grad`, the division alone would keep two more arrays of this
  size. In reverse mode only: `jax.jvp` of it is an error.
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
  """x in float32, or as it is where it is wider (float64 in checks)."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def einsum_f32(eqn: str, x: Array, y: Array) -> Array:
  """einsum(eqn, x, y) that is summed and left in float32 at least."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(eqn, x, y, preferred_element_type=dtype)
