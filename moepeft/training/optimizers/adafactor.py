# SPDX-License-Identifier: Apache-2.0
"""Adafactor (Shazeer and Stern, arXiv:1804.04235) as T5X has it.

The update is `optax.adafactor`'s. It is given each layer's matrices as T5X
keeps them: T5X keeps layers apart and joins heads with their size, and ours
are stacked. An array below 'layers' is L arrays on axis 0, each with its own
scale, clipping and factors, so that scanned layers go where separate ones
would.
"""

import math
import re
from collections.abc import Mapping

import jax
import optax

from moepeft.core.types import Array, Tree
from moepeft.nn.numerics import to_f32
from moepeft.training.optimizers.spec import OptimizerSpec

# Sides of at least this size are factored: T5X's default, and optax's.
MIN_FACTORED = 128

# Arrays of three axes or more that are matrices in T5X, where heads and their
# size are one axis: those of the first axis against the rest, and those of the
# rest against the last.
_FIRST = re.compile(r'.*/([qkv]/kernel|lora(_\d+)?/b)')
_LAST = re.compile(r'.*/(o/kernel|lora(_\d+)?/a)')


def adafactor(
  learning_rate: optax.Schedule,
  weight_decay: float = 0.0,
  decay_initial_step: int = 0,
) -> optax.GradientTransformation:
  """Adafactor with T5X's defaults: no momentum, relative to the parameter.

  Moments start at zero and keep 1 - t^-0.8 of themselves, t =
  decay_initial_step + 1 at the first update; nothing makes up for the empty
  start. At the released 1,100,000 (arXiv:2309.05444) an update's root mean
  square would be 261 at first, so that the clipping at 1 decides for long.

  Args:
    learning_rate: updates done -> learning rate; times max(1e-3, the root
      mean square of the parameter).
    weight_decay: the share of a parameter that every update takes away,
      whatever the rate is.
    decay_initial_step: updates that t counts as done before the first.
  """

  def transform(group: str) -> optax.GradientTransformation:
    kind, _, layers = group.partition('_')
    inner = optax.adafactor(
      learning_rate,
      min_dim_size_to_factor=MIN_FACTORED,
      # Optax subtracts it from the updates done.
      decay_offset=-decay_initial_step,
      weight_decay_rate=weight_decay or None,
      factored=kind == 'matrices',
    )
    if not layers:
      return inner
    return optax.GradientTransformation(
      jax.vmap(inner.init), jax.vmap(inner.update)
    )

  def init(params: Tree) -> dict[str, Tree]:
    return {
      group: transform(group).init(arrays)
      for group, arrays in _grouped(params).items()
    }

  def update(updates: Tree, state: dict[str, Tree], params: Tree):
    grouped_params = _grouped(params)
    changes, new_state = {}, {}
    for group, gradients in _grouped(updates).items():
      group_changes, new_state[group] = transform(group).update(
        gradients, state[group], grouped_params[group]
      )
      changes |= group_changes
    return jax.tree_util.tree_map_with_path(
      lambda path, param: changes[_name(path)].reshape(param.shape), params
    ), new_state

  return optax.GradientTransformation(init, update)


ADAFACTOR = OptimizerSpec(adafactor, keys=('decay_initial_step',))


def _grouped(params: Tree) -> Mapping[str, dict[str, Array]]:
  """{group: {path: float32 array}}, matrices with two axes a layer.

  Groups are 'matrices' and 'arrays', and with stacked layers of one number
  'matrices_24' and 'arrays_24'.
  """
  groups: dict[str, dict[str, Array]] = {}
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  for path, param in flat:
    name = _name(path)
    first = int(_stacked(name))
    suffix = f'_{param.shape[0]}' if first else ''
    rows = matrix_rows(name, param.shape)
    kind, array = 'arrays', to_f32(param)
    if rows is not None:
      kind = 'matrices'
      array = array.reshape(*param.shape[:first], rows, -1)
    groups.setdefault(kind + suffix, {})[name] = array
  return groups


def matrix_rows(path: str, shape: tuple[int, ...]) -> int | None:
  """Rows of the matrix that T5X has of an array; None where it has none.

  T5X factors matrices of two sides of at least 128. Arrays that it keeps with
  more axes than two are not factored: the released code's rules say so of
  every array that has experts beside a rank or heads.

  Args:
    path: 'encoder/layers/self/q/kernel'.
    shape: of the array, its layers on axis 0 where it has them.
  """
  axes = shape[int(_stacked(path)) :]
  if len(axes) == 2 or _FIRST.fullmatch(path):
    return axes[0]
  if _LAST.fullmatch(path):
    return math.prod(axes[:-1])
  return None


def _stacked(path: str) -> bool:
  return 'layers' in path.split('/')


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
