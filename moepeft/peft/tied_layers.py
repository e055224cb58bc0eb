# SPDX-License-Identifier: Apache-2.0
"""Arrays that groups of layers have in common, as in Lily.

Every layer stores a copy, so that scans, exports and servers treat these arrays
as all others. In training the first layer of a group has the gradient of all,
and the others copy it after each step.
"""

import math
import re
from collections.abc import Mapping

import flax
import numpy as np

from moepeft.core.types import Tree


def tie(tree: Tree, groups: Mapping[str, int]) -> Tree:
  """The tree, with the array of each group's first layer in all its layers.

  Args:
    tree: of arrays; below 'layers' the first axis is that of layers.
    groups: {regular expression of paths: the number of groups of consecutive
      layers}, `peft.build.Built.tied_arrays`.
  """
  if not groups:
    return tree
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  tied = {
    path: array[first_layers(array.shape[0], count)]
    for path, array in flat.items()
    if (count := _groups_at(path, groups))
  }
  return flax.traverse_util.unflatten_dict(flat | tied, sep='/')


def spare_sizes(
  tree: Tree, groups: Mapping[str, int], unread: Mapping[str, float]
) -> dict[str, int]:
  """{path: the number of an array's values that are copies or never read}.

  Args:
    groups: as of `tie`.
    unread: {regular expression of paths: the share that is never read}.
  """
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  sizes = {}
  for path, array in flat.items():
    size = math.prod(array.shape)
    share = next((s for p, s in unread.items() if re.search(p, path)), 0)
    read = round(size * (1 - share))
    if count := _groups_at(path, groups):
      layers = array.shape[0]
      read = read * len(set(first_layers(layers, count))) // layers
    if read < size:
      sizes[path] = size - read
  return sizes


def first_layers(layers: int, groups: int) -> np.ndarray:
  """int [layers]: the first layer of each layer's group."""
  size = -(-layers // groups)
  return np.arange(layers) // size * size


def _groups_at(path: str, groups: Mapping[str, int]) -> int:
  """The number of groups of the array at a path; 0 for one of each layer."""
  if 'layers' not in path.split('/'):
    return 0
  return next(
    (n for pattern, n in groups.items() if re.search(pattern, path)), 0
  )
