# SPDX-License-Identifier: Apache-2.0
"""Arrays of mixtures whose layers have unlike counts of experts.

Scanned layers are stacked, so all of them have arrays of the largest count; the
experts that a layer does not have are zeros that nothing reads and nothing
changes. Counts, optimizers and exported files leave them out: there each layer
has an array of its own, under the path that layers have without a scan.
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
  """The axis of an array that has an entry for each expert, some of zeros.

  Attributes:
    axis: its number in the stored array.
    counts: experts of each layer, the layers being on axis 0 where `stacked`;
      else of the array's one layer.
    stacked: whether layers are scanned.
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
    """The inverse of `split`, zeros where there is no expert.

    Args:
      arrays: in the order of the layers.
      size: of the padded axis.
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
    at = parts.index('layers')
    return [
      '/'.join((*parts[:at], f'layers_{i}', *parts[at + 1 :]))
      for i in range(len(self.counts))
    ]

  def size(self, shape: Sequence[int]) -> int:
    """Numbers in an array of a shape, without padding."""
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
    path: of the array.
    logical_axes: of the array, names of `AXIS_NAMES`.
    counts: of all layers of its stack.
  """
  # An outer mixture's experts would stand before the array's own.
  axis = len(logical_axes) - 1 - logical_axes[::-1].index(AXIS_NAMES['e'])
  if logical_axes[0] == AXIS_NAMES['l']:
    return PaddedAxis(axis, counts, True)
  number = int(_LAYER.search(path)[1])
  return PaddedAxis(axis, (counts[number],), False)


def split(
  arrays: Mapping[str, Any], padded: Mapping[str, PaddedAxis]
) -> dict[str, Any]:
  """{path: array} of all arrays, those with padding layer by layer."""
  result: dict[str, Any] = {}
  for path, array in arrays.items():
    result |= (
      padded[path].split(path, array) if path in padded else {path: array}
    )
  return result


def stack_layers(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Host arrays of 'layers_0', 'layers_1', ... stacked as 'layers', padded.

  Arrays under other paths stay as they are.

  Raises:
    ValueError: a layer is absent, or layers differ in more than one axis.
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
