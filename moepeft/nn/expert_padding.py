# SPDX-License-Identifier: Apache-2.0
"""Padding for mixtures whose layers have different numbers of experts.

Scanned layers are stacked, so their arrays are padded to the largest number of
experts. The padding is zeros that no code reads or changes. Parameter counts,
optimizers and exported files exclude it: there each layer has its own array,
under the path of layers without a scan.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from moepeft.core.types import AXIS_NAMES, Array

_LAYER = re.compile(r'(?<![^/])layers_(\d+)(?![^/])')


@dataclasses.dataclass(frozen=True)
class PaddedAxis:
  """The padded axis of experts in an array.

  Attributes:
    axis: its index in the stored array.
    counts: the number of experts in each layer; one number if not `stacked`.
    stacked: whether layers are scanned, so that they are on axis 0.
  """

  axis: int
  counts: tuple[int, ...]
  stacked: bool

  def split(self, path: str, array: Any) -> dict[str, Any]:
    """{path: array} of the layers, without padding."""
    if not self.stacked:
      return {path: self._without_padding(array, self.axis, self.counts[0])}
    return {
      name: self._without_padding(array[i], self.axis - 1, count)
      for i, (name, count) in enumerate(
        zip(self.paths(path), self.counts, strict=True)
      )
    }

  def join(self, arrays: Sequence[Array], size: int) -> Array:
    """The inverse of `split`, which adds the padding.

    Args:
      arrays: in the order of the layers.
      size: the size of the padded axis.
    """
    axis = self.axis - self.stacked
    padded = []
    for array in arrays:
      widths = [(0, 0)] * array.ndim
      widths[axis] = (0, size - array.shape[axis])
      padded.append(jnp.pad(array, widths))
    return jnp.stack(padded) if self.stacked else padded[0]

  def paths(self, path: str) -> list[str]:
    """The keys of `split`, in the order of the layers."""
    if not self.stacked:
      return [path]
    parts = path.split('/')
    index = parts.index('layers')
    return [
      '/'.join((*parts[:index], f'layers_{i}', *parts[index + 1 :]))
      for i in range(len(self.counts))
    ]

  def size(self, shape: Sequence[int]) -> int:
    """The number of elements in an array of a shape, without padding."""
    layers = shape[0] if self.stacked else 1
    return math.prod(shape) // (shape[self.axis] * layers) * sum(self.counts)

  def clear_padding(self, array: np.ndarray) -> None:
    """Sets the padding of a host array to zero."""
    experts = np.moveaxis(array, self.axis, self.stacked)
    for layer, count in zip(
      experts if self.stacked else [experts], self.counts, strict=True
    ):
      layer[count:] = 0

  def _without_padding(self, array: Any, axis: int, count: int) -> Any:
    return array[(slice(None),) * axis + (slice(count),)]


def padded_axis(
  path: str, logical_axes: tuple[str, ...], counts: tuple[int, ...]
) -> PaddedAxis:
  """
  Args:
    path: the array's path.
    logical_axes: the array's axes, values of `AXIS_NAMES`.
    counts: the number of experts in each layer of the stack.
  """
  # The last one, because the axis of an outer mixture precedes it.
  axis = len(logical_axes) - 1 - logical_axes[::-1].index(AXIS_NAMES['e'])
  if logical_axes[0] == AXIS_NAMES['l']:
    return PaddedAxis(axis, counts, True)
  number = int(_LAYER.search(path)[1])
  return PaddedAxis(axis, (counts[number],), False)


def split(
  arrays: Mapping[str, Any], padded: Mapping[str, PaddedAxis]
) -> dict[str, Any]:
  """{path: array} of all arrays, with padded ones split by layer."""
  result: dict[str, Any] = {}
  for path, array in arrays.items():
    result |= (
      padded[path].split(path, array) if path in padded else {path: array}
    )
  return result


def stack_layers(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Stacks host arrays of 'layers_0', 'layers_1', ... as 'layers', padded.

  Arrays with other paths are unchanged.

  Raises:
    ValueError: a layer is missing, or layers differ in more than one axis.
  """
  result: dict[str, np.ndarray] = {}
  layers: dict[str, dict[int, np.ndarray]] = {}
  for path, array in arrays.items():
    number = _LAYER.search(path)
    if number is None:
      result[path] = array
    else:
      stacked = path[: number.start()] + 'layers' + path[number.end() :]
      layers.setdefault(stacked, {})[int(number[1])] = array
  for path, by_number in layers.items():
    shapes = [array.shape for array in by_number.values()]
    if sorted(by_number) != [*range(len(by_number))] or (
      len({*map(len, shapes)}) > 1
      or sum(len({*sizes}) > 1 for sizes in zip(*shapes, strict=True)) > 1
    ):
      raise ValueError(
        f'{path}: expected an array of each layer that differs from the others '
        f'in the number of experts alone; got {shapes}'
      )
    stacked = np.zeros(
      (len(shapes), *map(max, zip(*shapes, strict=True))), np.float32
    )
    for i, array in by_number.items():
      stacked[(i, *map(slice, array.shape))] = array
    result[path] = stacked
  return result


def padding_size(
  shapes: Mapping[str, Sequence[int]], padded: Mapping[str, PaddedAxis]
) -> int:
  """The number of zeros that pad arrays of these shapes."""
  return sum(
    math.prod(shape) - padded[path].size(shape)
    for path, shape in shapes.items()
    if path in padded
  )
