# SPDX-License-Identifier: Apache-2.0
"""Adafactor (Shazeer and Stern, arXiv:1804.04235) as T5X has it.

T5X keeps layers apart, ours are stacked: an array below 'layers' is L arrays
on axis 0, each with its own scale, clipping and factors, so that scanned
layers go where separate ones would. Optax's knows neither that nor the clock.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from moepeft.core.types import Array, Tree
from moepeft.nn.numerics import to_f32

# T5X's defaults, which the released code keeps.
DECAY_RATE = 0.8
CLIPPING = 1.0
EPSILON_SQUARE, EPSILON_SCALE = 1e-30, 1e-3
MIN_FACTORED = 128

# Arrays of three axes or more that are matrices in T5X, where heads and their
# size are one axis: those of the first axis against the rest, and those of the
# rest against the last.
_FIRST = re.compile(r'.*/([qkv]/kernel|lora(_\d+)?/b)')
_LAST = re.compile(r'.*/(o/kernel|lora(_\d+)?/a)')


class Moments(NamedTuple):
  """Means of squared gradients, float32; None where they are not kept.

  Attributes:
    whole: of the parameter's shape.
    rows, columns: of its shape with 1 along the axes of the other.
  """

  whole: Array | None = None
  rows: Array | None = None
  columns: Array | None = None


class AdafactorState(NamedTuple):
  """count: updates done, int32 []; moments: a `Moments` a parameter."""

  count: Array
  moments: Tree


def adafactor(
  rate: optax.Schedule, clock: int = 0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
  """Adafactor with T5X's defaults: no momentum, relative to the parameter.

  Moments start at zero and keep 1 - t^-0.8 of themselves, t = clock + 1 at
  the first update; nothing makes up for the empty start. At the released
  clock of 1,100,000 (arXiv:2309.05444) an update's root mean square would be
  261 at first, so that the clipping at 1 decides for long.

  Args:
    rate: updates done -> learning rate; times max(1e-3, the root mean square
      of the parameter).
    clock: updates that t counts as done before the first.
    weight_decay: the share of a parameter that every update takes away,
      whatever the rate is.
  """

  def init(params: Tree) -> AdafactorState:
    return AdafactorState(
      jnp.int32(0), jax.tree_util.tree_map_with_path(_empty, params)
    )

  def update(gradient: Tree, state: AdafactorState, params: Tree):
    t = (state.count + clock).astype(jnp.float32) + 1
    keep = 1 - t**-DECAY_RATE
    lr = rate(state.count)
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    changes, moments = [], []
    for (path, param), g, old in zip(
      paths,
      tree.flatten_up_to(gradient),
      tree.flatten_up_to(state.moments),
      strict=True,
    ):
      within = _within(path, param.ndim)
      g = to_f32(g)
      new = _remember(old, g, keep)
      step = _clipped(_scaled(new, g, within), within)
      scale = jnp.maximum(_rms(to_f32(param), within), EPSILON_SCALE)
      changes.append(-weight_decay * to_f32(param) - lr * scale * step)
      moments.append(new)
    return tree.unflatten(changes), AdafactorState(
      state.count + 1, tree.unflatten(moments)
    )

  return optax.GradientTransformation(init, update)


def sides(path: str, shape: tuple[int, ...]):
  """The (row axes, column axes) that an array is factored along, or None.

  T5X factors matrices of two sides of at least 128. What it keeps with more
  axes than two is not factored: the released code's rules say so of every
  array that has experts beside a rank or heads.

  Args:
    path: 'encoder/layers/self/q/kernel'.
    shape: of the array, its layers on axis 0 where it has them.
  """
  first = int(_stacked(path))
  axes = tuple(range(first, len(shape)))
  if len(axes) == 2 or _FIRST.fullmatch(path):
    rows, columns = axes[:1], axes[1:]
  elif _LAST.fullmatch(path):
    rows, columns = axes[:-1], axes[-1:]
  else:
    return None
  sizes = (math.prod(shape[i] for i in side) for side in (rows, columns))
  return (rows, columns) if min(sizes) >= MIN_FACTORED else None


def _stacked(path: str) -> bool:
  return 'layers' in path.split('/')


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _within(path, ndim: int) -> tuple[int, ...]:
  """The axes of one layer."""
  return tuple(range(int(_stacked(_name(path))), ndim))


def _empty(path, param: Array) -> Moments:
  dtype = jnp.promote_types(param.dtype, jnp.float32)
  found = sides(_name(path), param.shape)
  if found is None:
    return Moments(whole=jnp.zeros(param.shape, dtype))
  rows, columns = (
    jnp.zeros(
      [1 if i in other else n for i, n in enumerate(param.shape)], dtype
    )
    for other in reversed(found)
  )
  return Moments(rows=rows, columns=columns)


def _remember(old: Moments, gradient: Array, keep: Array) -> Moments:
  """The moments with this gradient's square in them."""
  square = gradient**2 + EPSILON_SQUARE

  def mixed(moment: Array) -> Array:
    sizes = zip(moment.shape, square.shape, strict=True)
    other = tuple(i for i, (kept, n) in enumerate(sizes) if kept < n)
    new = jnp.mean(square, axis=other, keepdims=True)
    return keep * moment + (1 - keep) * new

  return jax.tree.map(mixed, old)


def _scaled(moments: Moments, gradient: Array, within: tuple[int, ...]):
  """The gradient over the root of its moments."""
  if moments.whole is not None:
    return gradient * moments.whole**-0.5
  mean = jnp.mean(moments.rows, axis=within, keepdims=True)
  return gradient * (moments.rows / mean) ** -0.5 * moments.columns**-0.5


def _clipped(step: Array, within: tuple[int, ...]) -> Array:
  return step / jnp.maximum(1, _rms(step, within) / CLIPPING)


def _rms(x: Array, within: tuple[int, ...]) -> Array:
  return jnp.sqrt(jnp.mean(x**2, axis=within, keepdims=True))
