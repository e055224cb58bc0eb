# SPDX-License-Identifier: Apache-2.0
"""The tree of an adapter as one slot of its bucket holds it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moepeft.checkpoints.adapter import instances
from moepeft.checkpoints.base import Base
from moepeft.config.method_string import Spec
from moepeft.core.types import Tree
from moepeft.inference.adapters.buckets import Bucket, BucketPart, scale_of
from moepeft.inference.adapters.load import Layout, TrainedAdapter, arrays_of
from moepeft.models import weight_mapping
from moepeft.moe import ROUTERS
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.initializers import Constant, ParamMetadata
from moepeft.nn.quantization import FORMATS
from moepeft.peft.method_text import flatten_expert, method_entry


def bucket_layouts(
  buckets: Sequence[Bucket], adapter_map: AdapterMap, base: Base
) -> dict[str, Layout]:
  """The arrays of one slot of each bucket.

  Args:
    adapter_map: of all of them.
  """
  arrays = arrays_of(base.family.module(base.config, adapter_map))
  return {
    bucket.name: {
      path: shape_and_metadata
      for path, shape_and_metadata in arrays.items()
      if any(f'/{part.name}/' in path for part in bucket.parts)
    }
    for bucket in buckets
  }


def slot_bytes(layout: Layout) -> int:
  """Bytes of one slot."""
  return 4 * sum(math.prod(shape) for shape, _ in layout.values())


def identity_tree(layout: Layout) -> Tree:
  """Slot 0: the base's function bit for bit."""
  return weight_mapping.unflatten(
    {path: _filled(shape, label) for path, (shape, label) in layout.items()}
  )


@dataclasses.dataclass(frozen=True)
class PaddedAdapter:
  """An adapter with what is written into a slot, on the host.

  Attributes:
    bucket: its name.
    tree: with the paths and shapes of the bucket's layout.
  """

  adapter: TrainedAdapter
  bucket: str
  tree: Tree


def pad_to_bucket(
  adapter: TrainedAdapter, bucket: Bucket, layout: Layout, base: Base
) -> PaddedAdapter:
  """The slot of an adapter.

  Raises:
    ValueError: a DoRA stands where its weight is not one of its own.
  """
  filled = {}
  specs = instances(adapter.built.method)
  for part, (instance, spec) in zip(bucket.parts, specs.items(), strict=True):
    source = _Source(adapter.arrays, instance, spec, part, base)
    for path, (shape, label) in layout.items():
      place, separator, leaf = path.partition(f'/{part.name}/')
      if separator and source.at(place):
        filled[path] = source.leaf(place, leaf, shape, label)
      elif separator:
        filled[path] = _filled(shape, label)
  return PaddedAdapter(adapter, bucket.name, weight_mapping.unflatten(filled))


class _Source:
  """The arrays of one part of an adapter, by place and leaf."""

  def __init__(
    self,
    arrays: Mapping[str, np.ndarray],
    instance: str,
    spec: Spec,
    part: BucketPart,
    base: Base,
  ):
    self._instance, self._spec, self._part = (
      instance,
      flatten_expert(spec),
      part,
    )
    self._base = base
    self._arrays: dict[str, dict[str, np.ndarray]] = {}
    for path, array in arrays.items():
      place, separator, leaf = path.partition(f'/{instance}/')
      if separator:
        self._arrays.setdefault(place, {})[leaf] = array

  def at(self, place: str) -> dict[str, np.ndarray] | None:
    return self._arrays.get(place)

  def leaf(
    self, place: str, leaf: str, shape: Any, label: ParamMetadata
  ) -> np.ndarray:
    here = self._arrays[place]
    if leaf == 'on':
      return np.ones(shape, np.float32)
    pooled_leaf = method_entry(self._spec).pooled_leaves.get(leaf)
    if pooled_leaf is not None:
      return self._pooled(pooled_leaf, place)
    if leaf == 'router/kernel' and leaf not in here:
      router = self._spec.get('router')
      path = (*place.split('/'), self._instance, 'router')
      return ROUTERS[router.name].pooled_kernel(
        path, dict(router.options), shape
      )
    array = here[leaf]
    if leaf == 'b' and self._part.rank:
      array = array * np.float32(scale_of(self._spec))
    return _padded(array, shape)

  def _pooled(self, pooled_leaf: Callable, place: str) -> np.ndarray:
    """An array that is worked out from the base's kernel, layer by layer."""
    if '/layers/' not in place:
      raise ValueError(
        f'{self._spec.name} at {place} cannot be served, only at projections '
        'within layers; merge the adapter (python -m moepeft.convert --to=hf) '
        'and serve the result as a base of its own'
      )
    arrays, scale = self._arrays[place], scale_of(self._spec)
    depth = len(next(iter(arrays.values())))
    return np.stack(
      [
        pooled_leaf(
          {name: array[layer] for name, array in arrays.items()},
          functools.partial(_kernel, self._base, place, layer),
          scale,
        )
        for layer in range(depth)
      ]
    )


def _kernel(
  base: Base, place: str, layer: int, shape: tuple[int, int]
) -> np.ndarray:
  """The weight of a projection, float32 [inputs, outputs]."""
  flat = weight_mapping.flatten(base.params)
  if f'{place}/kernel' in flat:
    weight = flat[f'{place}/kernel'][layer].astype(np.float32)
    return weight.reshape(shape)
  kind = base.quantise
  codes, scale = (flat[f'{place}/kernel_{n}'] for n in (kind, 'scale'))
  kernel = FORMATS[kind].decode(codes[layer], scale[layer], shape)
  return np.asarray(kernel, np.float32).reshape(shape)


def _filled(shape: Sequence[int], label: ParamMetadata) -> np.ndarray:
  """The identity, where no adapter is."""
  value = (
    label.initializer.value if isinstance(label.initializer, Constant) else 0
  )
  return np.full(shape, value, np.float32)


def _padded(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """With zeros after the last rank; other axes are of one size."""
  pairs = zip(shape, array.shape, strict=True)
  return np.pad(array, [(0, new - old) for new, old in pairs])
