# SPDX-License-Identifier: Apache-2.0
"""Parameters: frozen ones in 'params', those of advice in 'peft'."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.types import Array
from moepeft.nn.initializers import LABELS, Label, Start

COLLECTION = 'peft'


def param(
  module: nn.Module,
  name: str,
  start: Start,
  shape: tuple[int, ...],
  letters: str,
  dtype=jnp.float32,
) -> Array:
  """An array of the base model, in the collection 'params'.

  Args:
    letters: one for each axis of `shape`, as in the legend.
  """
  _tell(module, name, shape, Label('params', letters, start))
  return module.param(name, start, shape, dtype)


def peft_param(
  module: nn.Module,
  name: str,
  init: Start | Callable,
  shape: tuple[int, ...],
  letters: str,
) -> Array:
  """A trainable array of an adapter or router, float32 [shape].

  A stored array of another shape is an error that names both.

  Args:
    init: `Normal`, `Fill`, or a function (key, shape, dtype) -> array where
      the start depends on the base's weights (DoRA's magnitude).
    letters: one for each axis of `shape`, as in the legend.
  """
  start = init if isinstance(init, Start) else None
  _tell(module, name, shape, Label(COLLECTION, letters, start))
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


def _tell(module: nn.Module, name: str, shape, label: Label) -> None:
  """Leaves the array's label where whoever asked by an rng finds it."""
  if not module.has_rng(LABELS):
    return
  if len(label.letters) != len(shape):
    path = '/'.join((*module.path, name))
    raise ValueError(
      f'{path}: expected a letter for each axis of {shape}; got '
      f'{label.letters!r}'
    )
  module.variable(LABELS, name, lambda: label)
