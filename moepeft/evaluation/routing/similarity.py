# SPDX-License-Identifier: Apache-2.0
"""Similarity of experts: cosines of the changes that they make to weights.

The change of a low-rank expert is A B. Its inner product with another is
tr((A1 B1)^T A2 B2), the sum of the elements of (A1^T A2) * (B1 B2^T), two
matrices [r, r], so that no matrix of the layer's size is built.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax
import flax.linen as nn
import numpy as np

from moepeft.core.types import Tree

# Factors of the low-rank changes of experts, in their parameters' names.
_FACTORS = (
  ('a', 'b'),
  ('gate_a', 'gate_b'),
  ('up_a', 'up_b'),
  ('down_a', 'down_b'),
  ('down', 'up'),
)


def similarities(
  model: Any, peft: Tree, paths: Iterable[str]
) -> dict[str, np.ndarray | None]:
  """{path of a site: `expert_similarity`} of a model with adapters.

  Args:
    peft: the collection 'peft'.
  """
  adapters = {adapter.name: adapter for _, adapter in model.adapter_map.entries}
  flat = flax.traverse_util.flatten_dict(peft, sep='/')
  result = {}
  for path in paths:
    arrays = {
      name.removeprefix(f'{path}/'): array
      for name, array in flat.items()
      if name.startswith(f'{path}/')
    }
    stacked = 'layers' in path.split('/')
    adapter = adapters[path.rpartition('/')[2]]
    result[path] = expert_similarity(adapter, arrays, stacked)
  return result


def expert_similarity(
  adapter: nn.Module, arrays: Mapping[str, Any], stacked: bool
) -> np.ndarray | None:
  """Cosines [l, e, e] of the experts' changes; NaN for one without a change.

  Of a bottleneck it is the product of its projections, of a scale its distance
  from one. Changes that all experts have in common from the start are left
  out. None where experts have no such parameters, or are of several kinds.

  Args:
    adapter: a site's mixture.
    arrays: {name: array} of its parameters in the collection 'peft'.
    stacked: whether the first axis is of layers.
  """
  arrays = {
    name: np.asarray(array, np.float64)[... if stacked else None]
    for name, array in arrays.items()
  }
  e = adapter.experts
  products = [
    _inner_products(*factors(adapter, arrays, *names))
    for names in _FACTORS
    if set(names) <= arrays.keys()
  ]
  if 'scale' in arrays:
    changes = arrays['scale'] - 1
    changes = changes.reshape(*changes.shape[:2], -1)
    products.append(np.einsum('lei,lfi->lef', changes, changes))
  if not products:
    return None
  gram = sum(products)[:, :e, :e]
  norms = np.sqrt(np.einsum('lee->le', gram))
  norms = np.where(norms > 0, norms, np.nan)
  return gram / norms[:, :, None] / norms[:, None, :]


def factors(
  adapter: nn.Module, arrays: Mapping[str, np.ndarray], down: str, up: str
) -> tuple[np.ndarray, np.ndarray]:
  """(A [l, i, e, r], B [l, e, r, o]); a shared one is repeated.

  Args:
    adapter: a mixture.
    arrays: its parameters, stacked.
    down, up: the names of A and B in them.
  """
  a = _with_experts(adapter, arrays[down], down, -2)
  b = _with_experts(adapter, arrays[up], up, 1)
  if adapter.ranks:
    # Columns beyond an expert's rank are never read.
    a = a * (np.arange(a.shape[-1]) < np.array(adapter.ranks)[:, None])
  if 'core' in arrays:
    a = np.einsum('lier,lers->lies', a, arrays['core'])
  if f'initial_{down}' in arrays:
    a0 = _with_experts(adapter, arrays[f'initial_{down}'], down, -2)
    b0 = _with_experts(adapter, arrays[f'initial_{up}'], up, 1)
    a = np.concatenate([a, a0], axis=-1)
    b = np.concatenate([b, -b0], axis=2)
  return a, b


def _with_experts(
  adapter: nn.Module, array: np.ndarray, name: str, axis: int
) -> np.ndarray:
  """[l, i, e, r] of a down-projection, [l, e, r, o] of an up-projection.

  Args:
    axis: of the experts, -2 or 1.
  """
  if name in adapter.share:
    array = np.expand_dims(array, axis)
    e = adapter.experts + adapter.shared_experts
    shape = list(array.shape)
    shape[axis] = e
    array = np.broadcast_to(array, shape)
  if axis == 1:
    return array.reshape(*array.shape[:3], -1)
  return array.reshape(array.shape[0], -1, *array.shape[-2:])


def _inner_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """[l, e, e] of A [l, i, e, r] and B [l, e, r, o], a layer at a time."""
  return np.stack(
    [
      np.einsum(
        'efrs,efrs->ef',
        np.einsum('ier,ifs->efrs', a_layer, a_layer, optimize=True),
        np.einsum('ero,fso->efrs', b_layer, b_layer, optimize=True),
      )
      for a_layer, b_layer in zip(a, b, strict=True)
    ]
  )
