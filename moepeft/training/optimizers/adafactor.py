# SPDX-License-Identifier: Apache-2.0
"""Adafactor (Shazeer and Stern, arXiv:1804.04235) with T5X's parameter layout.

The update is that of `optax.adafactor`. T5X stores each layer as its own
arrays and merges the axes of heads and head size; here layers are stacked on
axis 0 and heads have their own axis. So arrays are reshaped to T5X's matrices,
and the update is mapped over layers: each layer has its own scale, clipping and
factors, as if layers were not scanned.
"""

import math
import re
from collections.abc import Mapping

import jax
import optax

from moepeft.core.ranges import is_zero
from moepeft.core.types import Array, Tree
from moepeft.nn.numerics import to_f32
from moepeft.training.optimizers.spec import OptimizerSpec

# A matrix is factored if both of its axes are at least this large. The value is
# the default of T5X and of optax.
MIN_DIM_SIZE_TO_FACTOR = 128

# Paths of arrays with three or more axes that are matrices in T5X: the rows are
# the first axis, or the columns are the last axis; the other axes are merged.
_FIRST_AXIS_IS_ROWS = re.compile(r'.*/([qkv]/kernel|lora(_\d+)?/b)')
_LAST_AXIS_IS_COLUMNS = re.compile(r'.*/(o/kernel|lora(_\d+)?/a)')


def adafactor(
  learning_rate: optax.Schedule,
  weight_decay: float = 0.0,
  decay_initial_step: int = 0,
) -> optax.GradientTransformation:
  """Adafactor with T5X's defaults: no momentum, and relative step sizes.

  The decay rate of the second moments is 1 - t^-0.8, where t is
  decay_initial_step + 1 at the first update. Moments start at zero without
  bias correction. With the released decay_initial_step of 1,100,000
  (arXiv:2309.05444), the first update would have a root mean square of 261,
  so updates are clipped to 1 for a long time.

  Args:
    learning_rate: step -> learning rate. It is multiplied by max(1e-3, root
      mean square of the parameter).
    weight_decay: the fraction of a parameter that every update subtracts,
      independent of the learning rate.
    decay_initial_step: the value of t before the first update.
  """

  def transform(group: str) -> optax.GradientTransformation:
    kind, _, layers = group.partition('_')
    inner = optax.adafactor(
      learning_rate,
      min_dim_size_to_factor=MIN_DIM_SIZE_TO_FACTOR,
      # Optax subtracts the offset from the step.
      decay_offset=-decay_initial_step,
      weight_decay_rate=None if is_zero(weight_decay) else weight_decay,
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
      for group, arrays in _group_arrays(params).items()
    }

  def update(updates: Tree, state: dict[str, Tree], params: Tree):
    grouped_params = _group_arrays(params)
    new_updates, new_state = {}, {}
    for group, gradients in _group_arrays(updates).items():
      group_updates, new_state[group] = transform(group).update(
        gradients, state[group], grouped_params[group]
      )
      new_updates |= group_updates
    return jax.tree_util.tree_map_with_path(
      lambda path, param: new_updates[_path_name(path)].reshape(param.shape),
      params,
    ), new_state

  return optax.GradientTransformation(init, update)


ADAFACTOR = OptimizerSpec(adafactor, keys=('decay_initial_step',))


def _group_arrays(params: Tree) -> Mapping[str, dict[str, Array]]:
  """{group: {path: float32 array}}; matrices have two axes per layer.

  The groups are 'matrices' and 'arrays' without layers, and for example
  'matrices_24' and 'arrays_24' for arrays with 24 stacked layers.
  """
  groups: dict[str, dict[str, Array]] = {}
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  for path, param in flat:
    name = _path_name(path)
    layer_axes = int(_has_stacked_layers(name))
    suffix = f'_{param.shape[0]}' if layer_axes else ''
    rows = matrix_rows(name, param.shape)
    kind, array = 'arrays', to_f32(param)
    if rows is not None:
      kind = 'matrices'
      array = array.reshape(*param.shape[:layer_axes], rows, -1)
    groups.setdefault(kind + suffix, {})[name] = array
  return groups


def matrix_rows(path: str, shape: tuple[int, ...]) -> int | None:
  """The number of rows of an array that is a matrix in T5X, else None.

  T5X factors matrices only. In the released code, an array with an axis of
  experts and an axis of ranks or heads has more than two axes, so it is not
  factored.

  Args:
    path: the path of the array, such as 'encoder/layers/self/q/kernel'.
    shape: the shape of the array, with stacked layers on axis 0.
  """
  axes = shape[int(_has_stacked_layers(path)) :]
  if len(axes) == 2 or _FIRST_AXIS_IS_ROWS.fullmatch(path):
    return axes[0]
  if _LAST_AXIS_IS_COLUMNS.fullmatch(path):
    return math.prod(axes[:-1])
  return None


def _has_stacked_layers(path: str) -> bool:
  return 'layers' in path.split('/')


def _path_name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
