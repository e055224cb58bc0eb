# SPDX-License-Identifier: Apache-2.0
"""Float32 at least: for sums that bfloat16 would spoil."""

import jax.numpy as jnp

from moepeft.core.types import Array


def wide(x: Array) -> Array:
  """x in float32, or as it is where it is wider (float64 in checks)."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def wide_einsum(eqn: str, x: Array, y: Array) -> Array:
  """einsum(eqn, x, y) that is summed and left in float32 at least."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(eqn, x, y, preferred_element_type=dtype)
