# SPDX-License-Identifier: Apache-2.0
"""Parameter metadata: the initializer and the logical axes of every array.

With it, the host initializes a model without `model.init`. Under jit, that
program has a random stream for each array, and takes longer to compile than the
training step.
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

# The collection of the metadata, filled if an rng of that name is passed.
METADATA = 'metadata'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Normal:
  """Independent samples from N(0, stddev^2)."""

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
class SymmetricUniform:
  """Independent draws from U(-bound, bound)."""

  bound: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)

  def draw(self, rng: np.random.Generator, shape, dtype) -> np.ndarray:
    return rng.uniform(-self.bound, self.bound, shape).astype(dtype)


def kaiming_uniform(inputs: int) -> SymmetricUniform:
  """torch.nn.Linear's initializer, kaiming_uniform_(a=sqrt(5))."""
  return SymmetricUniform(inputs**-0.5)


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


Initializer = Normal | Constant | SymmetricUniform | SparseNormal


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ParamMetadata(meta.AxisMetadata):
  """Initializer and axes of one array; a static pytree without leaves.

  Transforms add their axis: nn.scan and nn.vmap take {collection: axis} as
  `metadata_params`.

  Attributes:
    collection: the array's collection, 'params' or 'peft'.
    logical_axes: ('layers', 'embed', 'heads', 'head_dim'), values of
      `moepeft.core.types.AXIS_NAMES`.
    initializer: None if the initial value depends on the base's weights.
    expert_counts: the number of experts in each layer, if the layers differ and
      the array is padded to the largest number; else ().
  """

  collection: str
  logical_axes: tuple[str, ...]
  initializer: Initializer | None
  expert_counts: tuple[int, ...] = ()

  def add_axis(self, index: int, params: dict[str, str]) -> 'ParamMetadata':
    before, after = self.logical_axes[:index], self.logical_axes[index:]
    new_axis = params.get(self.collection)
    axes = (*before, *([new_axis] if new_axis else ()), *after)
    return dataclasses.replace(self, logical_axes=axes)

  def remove_axis(self, index: int, params: dict[str, str]) -> 'ParamMetadata':
    has_axis = self.collection in params
    axes = self.logical_axes[:index] + self.logical_axes[index + has_axis :]
    return dataclasses.replace(self, logical_axes=axes)

  def unbox(self) -> None:
    return None

  def replace_boxed(self, val: Any) -> 'ParamMetadata':
    return self


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ExpertCounts:
  """The number of experts in each layer, stored beside a module's metadata."""

  counts: tuple[int, ...]


def record_expert_counts(module: nn.Module, counts: tuple[int, ...]) -> None:
  """Records that arrays with experts in the module or below it are padded."""
  if module.has_rng(METADATA):
    module.variable(METADATA, 'expert_counts', lambda: ExpertCounts(counts))


def init_params(
  model: nn.Module, batch: Batch, seed: int, params: Tree | None = None
) -> dict[str, Tree]:
  """Initializes a model: {'params': ..., 'peft': ...}.

  The arrays are on the host, because they may exceed a device's memory, except
  for those that are computed from the base's weights. The values of an array
  depend on the seed and its path only, so not on other adapters, devices or the
  mesh.

  Args:
    batch: the smallest batch that the model accepts.
    params: the base's weights; if None, they are initialized too.
  """
  shapes = _shapes(model, batch, params)
  metadata = _flatten(shapes[METADATA])
  initializers = {path: a.initializer for path, a in metadata.items()}
  if params is None:
    params = _initialize(_flatten(shapes['params']), initializers, seed)
  peft_shapes = _flatten(shapes.get('peft', {}))
  independent = {
    path: leaf for path, leaf in peft_shapes.items() if initializers[path]
  }
  peft = _flatten(_initialize(independent, initializers, seed))
  if independent != peft_shapes:
    # The other arrays depend on the base's weights.
    key = jax.random.key(seed)
    peft = _flatten(_init_from_base(model, batch, params, key)) | peft
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
  """{'params': ..., 'peft': ...} with the axis names of every array, such as
  PartitionSpec('layers', 'embed').

  Args:
    batch: the smallest batch that the model accepts.
    params: the base's weights or shapes, if they may be quantized; None for
      those that the model initializes.
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
  """The shapes and metadata of all collections."""
  leaves, tree = jax.tree.flatten((batch, params))
  collections = _trace(model, tuple((a.shape, a.dtype) for a in leaves), tree)
  return collections if params is None else {**collections, 'params': params}


@functools.lru_cache(maxsize=8)
def _trace(model: nn.Module, leaves: tuple, tree: Any) -> dict[str, Tree]:
  """`_shapes`, cached, because tracing a model takes a second or two."""
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
  """The metadata, with the `expert_counts` of arrays with experts."""
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


def _initialize(
  shapes: Mapping[str, Any], initializers: Mapping[str, Initializer], seed: int
) -> Tree:
  """Initializes arrays, each with its own random generator."""
  arrays = {}
  for path, leaf in shapes.items():
    rng = np.random.default_rng((seed, zlib.crc32(path.encode())))
    arrays[path] = initializers[path].draw(rng, leaf.shape, leaf.dtype)
  return _unflatten(arrays)


def _init_from_base(
  model: nn.Module, batch: Batch, params: Tree, key: Array
) -> Tree:
  @jax.jit
  def init(params):
    _, collections = model.apply(
      {'params': params}, batch, rngs={'peft': key}, mutable=['peft']
    )
    return collections['peft']

  return init(params)


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

  Args:
    init: `Normal`, `Constant`, or a function (key, shape, dtype) -> array if
      the initial value depends on the base's weights (DoRA's magnitude).
    axes: one letter for each axis of `shape`, keys of AXIS_NAMES.

  Raises:
    ValueError: the stored array has another shape.
  """
  initializer = init if isinstance(init, Initializer) else None
  _record(module, name, shape, COLLECTION, axes, initializer)
  if module.has_rng(METADATA):
    # Shapes alone are wanted: no decomposition is traced, or refused because
    # the rank of a pool is larger than any adapter's.
    init = Constant(0)
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
  """Records the metadata in the collection METADATA, if its rng is passed."""
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
