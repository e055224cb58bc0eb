# SPDX-License-Identifier: Apache-2.0
"""Parameters of advice: float32, in the collection 'peft'."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from moepeft.typing import Array

COLLECTION = 'peft'


def peft_param(
  module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]
) -> Array:
  """A trainable array of an adapter or router, float32 [shape].

  Initialised from the rng 'peft'. A stored array of another shape is an
  error that names both.
  """
  variable = module.variable(
    COLLECTION,
    name,
    lambda: init(module.make_rng(COLLECTION), shape, jnp.float32),
  )
  if variable.value.shape != shape:
    path = '/'.join((*module.path, name))
    raise ValueError(
      f'{path}: expected shape {shape}, got {variable.value.shape}; the '
      'adapter was made for another model or method'
    )
  return variable.value
