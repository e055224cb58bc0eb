# SPDX-License-Identifier: Apache-2.0
"""Parameter metadata: initializer and logical axes of every array.

It lets the host initialize a model without tracing `model.init`: under jit
that is a program of one random stream an array, which takes longer to compile
than the training step.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import PartitionSpec

from moepeft.core.types import AXIS_NAMES, Array, Batch, Tree
from moepeft.nn.expert_padding import PaddedAxis, padded_axis

# The collection that holds it, filled where the rng of that name is given.
METADATA = 'metadata'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Normal:
  """Independent draws from N(0, stddev^2)."""

  stddev: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.normal(key, shape, dtype) * self.stddev

  def draw(self, rng: np.random.Generator, shape, dtype) -> np.ndarray:
    return (rng.standard_normal(shape, np.float32) * self.stddev).astype(dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Constant:
  """One value everywhere."""

  value: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    return jnp.full(shape, self.value, dtype)

  def draw(self, rng: np.random.Generator, shape, dtype) -> np.ndarray:
    del rng
    return np.full(shape, self.value, dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Uniform:
  """Independent draws from U(-bound, bound)."""

  bound: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)

  def draw(self, rng: np.random.Generator, shape, dtype) -> np.ndarray:
    return rng.uniform(-self.bound, self.bound, shape).astype(dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SparseNormal:
  """Columns with the same number of entries from N(0, stddev^2), else zeros.

  Attributes:
    stddev: of the entries that are not zero.
    density: the share of a column's entries that are not zero.
    inputs, columns: the numbers of axes of a column and of columns, which are
      the last ones of the array.
  """

  stddev: float
  density: float
  inputs: int
  columns: int

  def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    seed = jax.random.bits(key, dtype=jnp.uint32)
    draw = lambda seed: self.draw(np.random.default_rng(seed), shape, dtype)  # noqa: E731
    return jax.pure_callback(draw, jax.ShapeDtypeStruct(shape, dtype), seed)

  def draw(self, rng: np.random.Generator, shape, dtype) -> np.ndarray:
    split = len(shape) - self.columns
    size = math.prod(shape[split - self.inputs : split])
    noise = rng.random((math.prod(shape) // size, size), np.float32)
    rank = noise.argsort(axis=1).argsort(axis=1)
    values = rng.standard_normal(noise.shape, np.float32) * self.stddev
    values[rank >= max(1, int(size * self.density))] = 0
    layers = math.prod(shape[: split - self.inputs])
    values = values.reshape(layers, -1, size).swapaxes(1, 2)
    return values.reshape(shape).astype(dtype)


Initializer = Normal | Constant | Uniform | SparseNormal


def kaiming(inputs: int) -> Uniform:
  """torch.nn.Linear's initializer, kaiming_uniform_(a=sqrt(5))."""
  return Uniform(inputs**-0.5)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ParamMetadata(meta.AxisMetadata):
  """Initializer and axes of one array; a static pytree without leaves.

  Transforms add their axis: nn.scan and nn.vmap take {collection: axis} as
  `metadata_params`.

  Attributes:
    collection: 'params' or 'peft', which the array is in.
    logical_axes: ('layers', 'embed', 'heads', 'head_dim'), values of
      `moepeft.core.types.AXIS_NAMES`.
    initializer: None where the initial value depends on the base's weights.
    expert_counts: of each layer, where they differ and the array has an axis of
      the largest; else ().
  """

  collection: str
  logical_axes: tuple[str, ...]
  initializer: Initializer | None
  expert_counts: tuple[int, ...] = ()

  def add_axis(self, index: int, params: dict[str, str]) -> 'ParamMetadata':
    before, after = self.logical_axes[:index], self.logical_axes[index:]
    added = params.get(self.collection)
    axes = (*before, *([added] if added else ()), *after)
    return dataclasses.replace(self, logical_axes=axes)

  def remove_axis(self, index: int, params: dict[str, str]) -> 'ParamMetadata':
    removed = self.collection in params
    axes = self.logical_axes[:index] + self.logical_axes[index + removed :]
    return dataclasses.replace(self, logical_axes=axes)

  def unbox(self) -> None:
    return None

  def replace_boxed(self, val: Any) -> 'ParamMetadata':
    return self


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ExpertCounts:
  """The experts of each layer, beside the metadata of a module's arrays."""

  counts: tuple[int, ...]


def record_expert_counts(module: nn.Module, counts: tuple[int, ...]) -> None:
  """Says that arrays with experts, in the module or below it, are padded."""
  if module.has_rng(METADATA):
    module.variable(METADATA, 'expert_counts', lambda: ExpertCounts(counts))


def init_params(
  model: nn.Module, batch: Batch, seed: int, params: Tree | None = None
) -> dict[str, Tree]:
  """{'params': ..., 'peft': ...} of a model that has not been trained.

  Host arrays, but for what is computed from the base: they may be more than
  one device holds.

  What an array draws is a function of the seed and its path: the same
  whatever adapters are beside it, on every device and mesh.

  Args:
    batch: the smallest that the model takes.
    params: the base's weights; None draws them too.
  """
  shapes = _shapes(model, batch, params)
  metadata = _flatten(shapes[METADATA])
  initializers = {path: a.initializer for path, a in metadata.items()}
  if params is None:
    params = _draw(_flatten(shapes['params']), initializers, seed)
  peft_shapes = _flatten(shapes.get('peft', {}))
  drawable = {
    path: leaf for path, leaf in peft_shapes.items() if initializers[path]
  }
  peft = _flatten(_draw(drawable, initializers, seed))
  if drawable != peft_shapes:
    # These depend on the base's weights.
    key = jax.random.key(seed)
    computed = _flatten(_computed(model, batch, params, key))
    peft |= {
      path: computed[path] for path in peft_shapes.keys() - drawable.keys()
    }
  for path, axis in _padded_axes(metadata).items():
    peft[path] = np.array(peft[path])
    axis.clear_padding(peft[path])
  return {'params': params, 'peft': _unflatten(peft)}


def padded_axes(
  model: nn.Module, batch: Batch, params: Tree | None = None
) -> dict[str, PaddedAxis]:
  """{path in 'peft': the axis of its experts} of arrays with padding.

  Args: as of `logical_axes`.
  """
  return _padded_axes(_flatten(_shapes(model, batch, params)[METADATA]))


def _padded_axes(
  metadata: Mapping[str, ParamMetadata],
) -> dict[str, PaddedAxis]:
  return {
    path: padded_axis(path, entry.logical_axes, entry.expert_counts)
    for path, entry in metadata.items()
    if entry.expert_counts
  }


def logical_axes(
  model: nn.Module, batch: Batch, params: Tree | None = None
) -> dict[str, Tree]:
  """{'params': ..., 'peft': ...}: PartitionSpec('layers', 'embed'), the names
  of the axes of every array.

  Args:
    batch: the smallest that the model takes.
    params: the base's weights, or shapes, where they may be quantised; None
      for those that the model would make.
  """
  shapes = _shapes(model, batch, params)
  metadata = _flatten(shapes[METADATA])
  return {
    name: _unflatten(
      {
        path: PartitionSpec(*metadata[path].logical_axes)
        for path in _flatten(shapes.get(name, {}))
      }
    )
    for name in ('params', 'peft')
  }


def param_metadata(
  model: nn.Module, batch: Batch, params: Tree | None = None
) -> dict[str, tuple[tuple[int, ...], ParamMetadata]]:
  """{path: (shape, metadata)} of every array in 'peft'.

  Args: as of `logical_axes`.
  """
  shapes = _shapes(model, batch, params)
  metadata = _flatten(shapes[METADATA])
  peft_shapes = _flatten(shapes.get('peft', {}))
  return {
    path: (leaf.shape, metadata[path]) for path, leaf in peft_shapes.items()
  }


def shapes(
  model: nn.Module, batch: Batch, params: Tree | None = None
) -> dict[str, Tree]:
  """{'params': ..., 'peft': ...}: the shapes of every array.

  Args: as of `logical_axes`.
  """
  collections = _shapes(model, batch, params)
  return {name: collections.get(name, {}) for name in ('params', 'peft')}


def _shapes(
  model: nn.Module, batch: Batch, params: Tree | None
) -> dict[str, Tree]:
  """All collections without an array: shapes and metadata."""
  leaves, tree = jax.tree.flatten((batch, params))
  collections = _traced(model, tuple((a.shape, a.dtype) for a in leaves), tree)
  return collections if params is None else {**collections, 'params': params}


@functools.lru_cache(maxsize=8)
def _traced(model: nn.Module, leaves: tuple, tree: Any) -> dict[str, Tree]:
  """Traced once for a model, which takes a second or two."""
  batch, params = tree.unflatten(
    [jax.ShapeDtypeStruct(*leaf) for leaf in leaves]
  )
  rngs = dict.fromkeys(('params', 'peft', METADATA), jax.random.key(0))
  if params is None:
    collections = jax.eval_shape(lambda batch: model.init(rngs, batch), batch)
  else:
    collections = jax.eval_shape(
      lambda params, batch: model.apply(
        {'params': params}, batch, rngs=rngs, mutable=['peft', METADATA]
      )[1],
      params,
      batch,
    )
  return {
    **collections,
    METADATA: _with_expert_counts(collections[METADATA]),
  }


def _with_expert_counts(metadata: Tree, counts: tuple[int, ...] = ()) -> Tree:
  """The metadata, arrays with experts having the counts of their layers."""
  for value in metadata.values():
    if isinstance(value, ExpertCounts):
      counts = value.counts
  result = {}
  for key, value in metadata.items():
    if isinstance(value, Mapping):
      result[key] = _with_expert_counts(value, counts)
    elif not isinstance(value, ExpertCounts):
      with_experts = counts and AXIS_NAMES['e'] in value.logical_axes
      result[key] = (
        dataclasses.replace(value, expert_counts=counts)
        if with_experts
        else value
      )
  return result


def _draw(
  shapes: Mapping[str, Any], initializers: Mapping[str, Initializer], seed: int
) -> Tree:
  """Arrays of the shapes, each from a stream of its own."""
  drawn = {}
  for path, leaf in shapes.items():
    rng = np.random.default_rng((seed, zlib.crc32(path.encode())))
    drawn[path] = initializers[path].draw(rng, leaf.shape, leaf.dtype)
  return _unflatten(drawn)


def _computed(model: nn.Module, batch: Batch, params: Tree, key: Array) -> Tree:
  @jax.jit
  def start(params):
    _, collections = model.apply(
      {'params': params}, batch, rngs={'peft': key}, mutable=['peft']
    )
    return collections['peft']

  return start(params)


def _flatten(tree: Tree) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _unflatten(flat: Mapping[str, Any]) -> Tree:
  return flax.traverse_util.unflatten_dict(flat, sep='/')


COLLECTION = 'peft'


def param(
  module: nn.Module,
  name: str,
  initializer: Initializer,
  shape: tuple[int, ...],
  axes: str,
  dtype=jnp.float32,
) -> Array:
  """An array of the base model, in the collection 'params'.

  Args:
    axes: one letter for each axis of `shape`, keys of AXIS_NAMES.
  """
  _record(module, name, shape, 'params', axes, initializer)
  return module.param(name, initializer, shape, dtype)


def peft_param(
  module: nn.Module,
  name: str,
  init: Initializer | Callable,
  shape: tuple[int, ...],
  axes: str,
) -> Array:
  """A trainable array of an adapter or router, float32 [shape].

  A stored array of another shape is an error that names both.

  Args:
    init: `Normal`, `Constant`, or a function (key, shape, dtype) -> array where
      the initial value depends on the base's weights (DoRA's magnitude).
    axes: one letter for each axis of `shape`, keys of AXIS_NAMES.
  """
  initializer = init if isinstance(init, Initializer) else None
  _record(module, name, shape, COLLECTION, axes, initializer)
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


def _record(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  collection: str,
  axes: str,
  initializer: Initializer | None,
) -> None:
  """Sows the metadata, in the collection METADATA, where its rng is given."""
  if not module.has_rng(METADATA):
    return
  if len(axes) != len(shape):
    path = '/'.join((*module.path, name))
    raise ValueError(
      f'{path}: expected a letter for each axis of {shape}; got {axes!r}'
    )
  logical_axes = tuple(AXIS_NAMES[letter] for letter in axes)
  metadata = ParamMetadata(collection, logical_axes, initializer)
  module.variable(METADATA, name, lambda: metadata)
