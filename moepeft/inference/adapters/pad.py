# SPDX-License-Identifier: Apache-2.0
"""Pads an adapter's arrays to the shapes of its bucket."""

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np

from moepeft.checkpoints.adapter import method_instances
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
  """Returns the layout of one slot of each bucket.

  Args:
    adapter_map: the adapter map of all buckets.
  """
  arrays = arrays_of(base.family.module(base.config, adapter_map))
  bucket_names = {part.name: b.name for b in buckets for part in b.parts}
  layouts: dict[str, dict] = {bucket.name: {} for bucket in buckets}
  for path, spec in arrays.items():
    _, name, _ = _split_path(path, bucket_names)
    if name:
      layouts[bucket_names[name]][path] = spec
  return layouts


def _split_path(path: str, names: Container[str]) -> tuple[str, str, str]:
  """Splits a path into (target module, name of the adapter, leaf).

  The name is the first of `names`: experts of several kinds have names below
  it. ('', '', '') if the path has none.
  """
  parts = path.split('/')
  for i, part in enumerate(parts):
    if part in names:
      return '/'.join(parts[:i]), part, '/'.join(parts[i + 1 :])
  return '', '', ''


def slot_bytes(layout: Layout) -> int:
  """The bytes of one slot."""
  return 4 * sum(math.prod(shape) for shape, _ in layout.values())


def identity_tree(layout: Layout) -> Tree:
  """The arrays of slot 0, with which the model computes exactly the base."""
  return weight_mapping.unflatten(
    {
      path: _identity_array(shape, metadata)
      for path, (shape, metadata) in layout.items()
    }
  )


@dataclasses.dataclass(frozen=True)
class PaddedAdapter:
  """An adapter, and its arrays in the shapes of its bucket, on the host.

  Attributes:
    bucket: the name of the bucket.
    tree: arrays with the paths and shapes of the bucket's layout.
  """

  adapter: TrainedAdapter
  bucket: str
  tree: Tree


def pad_to_bucket(
  adapter: TrainedAdapter, bucket: Bucket, layout: Layout, base: Base
) -> PaddedAdapter:
  """Pads an adapter to a slot of a bucket.

  Raises:
    ValueError: a DoRA adapts a module whose kernel is not a layer's.
  """
  arrays = {}
  specs = method_instances(adapter.built.method)
  leaves: dict[str, dict[str, dict[str, np.ndarray]]] = {}
  for path, array in adapter.arrays.items():
    target, instance, leaf = _split_path(path, specs)
    leaves.setdefault(instance, {}).setdefault(target, {})[leaf] = array
  sources = {
    part.name: _TrainedPart(leaves.get(name, {}), name, spec, part, base)
    for part, (name, spec) in zip(bucket.parts, specs.items(), strict=True)
  }
  for path, (shape, metadata) in layout.items():
    target, name, leaf = _split_path(path, sources)
    if sources[name].has_target(target):
      arrays[path] = sources[name].padded_leaf(target, leaf, shape)
    else:
      arrays[path] = _identity_array(shape, metadata)
  return PaddedAdapter(adapter, bucket.name, weight_mapping.unflatten(arrays))


class _TrainedPart:
  """The arrays of one method of an adapter, {target module: {leaf: array}}."""

  def __init__(
    self,
    arrays: Mapping[str, dict[str, np.ndarray]],
    instance: str,
    spec: Spec,
    part: BucketPart,
    base: Base,
  ):
    self._instance, self._spec = instance, flatten_expert(spec)
    self._part, self._base, self._arrays = part, base, arrays

  def has_target(self, target: str) -> bool:
    return target in self._arrays

  def padded_leaf(self, target: str, leaf: str, shape: Any) -> np.ndarray:
    """Pads or derives one array of a target module."""
    leaves = self._arrays[target]
    if leaf == 'on':
      return np.ones(shape, np.float32)
    pooled_leaf = method_entry(self._spec).pooled_leaves.get(leaf)
    if pooled_leaf is not None:
      return self._derived_array(pooled_leaf, target)
    if leaf == 'router/kernel' and leaf not in leaves:
      router = self._spec.get('router')
      path = (*target.split('/'), self._instance, 'router')
      return ROUTERS[router.name].pooled_kernel(
        path, dict(router.options), shape
      )
    array = leaves[leaf]
    if leaf in method_entry(self._spec).scaled_leaves and self._part.rank:
      array = array * np.float32(scale_of(self._spec))
    return _pad_rank(array, shape)

  def _derived_array(self, pooled_leaf: Callable, target: str) -> np.ndarray:
    """Derives an array from the base's kernels, layer by layer."""
    if '/layers/' not in target:
      raise ValueError(
        f'{self._spec.name} at {target} cannot be served, only at projections '
        'within layers; merge the adapter (python -m moepeft.convert --to=hf) '
        'and serve the result as a base of its own'
      )
    arrays, scale = self._arrays[target], scale_of(self._spec)
    depth = len(next(iter(arrays.values())))
    return np.stack(
      [
        pooled_leaf(
          {name: array[layer] for name, array in arrays.items()},
          functools.partial(_kernel, self._base, target, layer),
          scale,
        )
        for layer in range(depth)
      ]
    )


def _kernel(
  base: Base, target: str, layer: int, shape: tuple[int, int]
) -> np.ndarray:
  """Returns the kernel of a projection, float32 [inputs, outputs]."""
  flat = weight_mapping.flatten(base.params)
  if f'{target}/kernel' in flat:
    weight = flat[f'{target}/kernel'][layer].astype(np.float32)
    return weight.reshape(shape)
  kind = base.quantise
  codes, scale = (flat[f'{target}/kernel_{n}'] for n in (kind, 'scale'))
  kernel = FORMATS[kind].decode(codes[layer], scale[layer], shape)
  return np.asarray(kernel, np.float32).reshape(shape)


def _identity_array(
  shape: Sequence[int], metadata: ParamMetadata
) -> np.ndarray:
  """The array with which the adapter computes the identity."""
  value = (
    metadata.initializer.value
    if isinstance(metadata.initializer, Constant)
    else 0
  )
  return np.full(shape, value, np.float32)


def _pad_rank(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """Pads the rank axis with zeros; the other axes have equal sizes."""
  pairs = zip(shape, array.shape, strict=True)
  return np.pad(array, [(0, new - old) for new, old in pairs])
