# SPDX-License-Identifier: Apache-2.0
"""Pooling of token states into one vector per text (arXiv:1908.10084)."""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array
from moepeft.nn.numerics import to_f32


def cls_pooling(states: Array, mask: Array) -> Array:
  """The first token's state: [b, t, d] -> [b, d]."""
  del mask
  return to_f32(states[:, 0])


def mean(states: Array, mask: Array) -> Array:
  """The mean over real tokens, mask bool [b, t]; zeros where there are none."""
  real = mask[..., None]
  total = jnp.sum(jnp.where(real, to_f32(states), 0), axis=1)
  return total / jnp.maximum(jnp.sum(real, axis=1), 1)


def max_pooling(states: Array, mask: Array) -> Array:
  """The largest value of each feature over real tokens; zeros for none."""
  states = jnp.where(mask[..., None], to_f32(states), -jnp.inf)
  pooled = jnp.max(states, axis=1)
  return jnp.where(jnp.any(mask, axis=1)[:, None], pooled, 0)


# By sentence-transformers' names.
POOLINGS = {'cls': cls_pooling, 'mean': mean, 'max': max_pooling}


def l2_normalize(x: Array) -> Array:
  """Scales each row of x [b, d] to L2 norm one; zero rows stay zero."""
  squares = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
