# SPDX-License-Identifier: Apache-2.0
"""What arrays say of themselves: how they start, and their axes' letters.

A model initialised under jit is a program of random bits, one stream an array,
that takes longer to compile than the training step. Here the host draws, from
the shapes and from what each array says of its start.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from moepeft.core.types import Array, Batch, Tree

# The collection, and the rng that asks for it, in which arrays say it.
LABELS = 'labels'


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
class Fill:
  """One value everywhere."""

  value: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    return jnp.full(shape, self.value, dtype)

  def draw(self, rng: np.random.Generator, shape, dtype) -> np.ndarray:
    del rng
    return np.full(shape, self.value, dtype)


Start = Normal | Fill


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Label(meta.AxisMetadata):
  """What an array says of itself; static, of no array.

  Scanned layers and vmapped experts put their letter in front by themselves:
  `metadata_params` of the transform is {collection: letter}.

  Attributes:
    collection: 'params' or 'peft', which the array is in.
    letters: its axes, 'ldnh'; the legend is in moepeft.core.types.
    start: how it starts; None where that depends on the base's weights.
  """

  collection: str
  letters: str
  start: Start | None

  def add_axis(self, index: int, params: dict[str, str]) -> 'Label':
    before, after = self.letters[:index], self.letters[index:]
    letters = before + params.get(self.collection, '') + after
    return dataclasses.replace(self, letters=letters)

  def remove_axis(self, index: int, params: dict[str, str]) -> 'Label':
    own = self.collection in params
    letters = self.letters[:index] + self.letters[index + own :]
    return dataclasses.replace(self, letters=letters)

  def unbox(self) -> None:
    return None

  def replace_boxed(self, val: Any) -> 'Label':
    return self


def fresh(
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
  starts = {path: a.start for path, a in _flatten(shapes[LABELS]).items()}
  if params is None:
    params = _draw(_flatten(shapes['params']), starts, seed)
  wanted = _flatten(shapes.get('peft', {}))
  known = {path: leaf for path, leaf in wanted.items() if starts[path]}
  peft = _flatten(_draw(known, starts, seed))
  if known != wanted:
    # These depend on the base's weights.
    key = jax.random.key(seed)
    computed = _flatten(_computed(model, batch, params, key))
    peft |= {path: computed[path] for path in wanted.keys() - known.keys()}
  return {'params': params, 'peft': _unflatten(peft)}


def letters(
  model: nn.Module, batch: Batch, params: Tree | None = None
) -> dict[str, Tree]:
  """{'params': ..., 'peft': ...}: the letters of every array, by its path.

  Args:
    batch: the smallest that the model takes.
    params: the base's weights, or shapes, where they may be quantised; None
      for those that the model would make.
  """
  shapes = _shapes(model, batch, params)
  labels = _flatten(shapes[LABELS])
  return {
    name: _unflatten(
      {path: labels[path].letters for path in _flatten(shapes.get(name, {}))}
    )
    for name in ('params', 'peft')
  }


def described(
  model: nn.Module, batch: Batch, params: Tree | None = None
) -> dict[str, tuple[tuple[int, ...], Label]]:
  """{path: (shape, what it says of itself)} of every array in 'peft'.

  Args: as of `letters`.
  """
  shapes = _shapes(model, batch, params)
  labels = _flatten(shapes[LABELS])
  wanted = _flatten(shapes.get('peft', {}))
  return {path: (leaf.shape, labels[path]) for path, leaf in wanted.items()}


def shapes(
  model: nn.Module, batch: Batch, params: Tree | None = None
) -> dict[str, Tree]:
  """{'params': ..., 'peft': ...}: the shapes of every array.

  Args: as of `letters`.
  """
  found = _shapes(model, batch, params)
  return {name: found.get(name, {}) for name in ('params', 'peft')}


def _shapes(
  model: nn.Module, batch: Batch, params: Tree | None
) -> dict[str, Tree]:
  """All collections without an array: shapes, and the arrays' labels."""
  leaves, tree = jax.tree.flatten((batch, params))
  made = _traced(model, tuple((a.shape, a.dtype) for a in leaves), tree)
  return made if params is None else {**made, 'params': params}


@functools.lru_cache(maxsize=8)
def _traced(model: nn.Module, leaves: tuple, tree: Any) -> dict[str, Tree]:
  """Traced once for a model, which takes a second or two."""
  batch, params = tree.unflatten(
    [jax.ShapeDtypeStruct(*leaf) for leaf in leaves]
  )
  rngs = dict.fromkeys(('params', 'peft', LABELS), jax.random.key(0))
  if params is None:
    return jax.eval_shape(lambda batch: model.init(rngs, batch), batch)
  return jax.eval_shape(
    lambda params, batch: model.apply(
      {'params': params}, batch, rngs=rngs, mutable=['peft', LABELS]
    )[1],
    params,
    batch,
  )


def _draw(
  shapes: Mapping[str, Any], starts: Mapping[str, Start], seed: int
) -> Tree:
  """Arrays of the shapes, each from a stream of its own."""
  drawn = {}
  for path, leaf in shapes.items():
    rng = np.random.default_rng((seed, zlib.crc32(path.encode())))
    drawn[path] = starts[path].draw(rng, leaf.shape, leaf.dtype)
  return _unflatten(drawn)


def _computed(model: nn.Module, batch: Batch, params: Tree, key: Array) -> Tree:
  @jax.jit
  def start(params):
    _, made = model.apply(
      {'params': params}, batch, rngs={'peft': key}, mutable=['peft']
    )
    return made['peft']

  return start(params)


def _flatten(tree: Tree) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _unflatten(flat: Mapping[str, Any]) -> Tree:
  return flax.traverse_util.unflatten_dict(flat, sep='/')


COLLECTION = 'peft'


def param(
  module: nn.Module,
  name: str,
  start: Start,
  shape: tuple[int, ...],
  letters: str,
  dtype=jnp.float32,
) -> Array:
  """An array of the base model, in the collection 'params'.

  Args:
    letters: one for each axis of `shape`, as in the legend.
  """
  _tell(module, name, shape, Label('params', letters, start))
  return module.param(name, start, shape, dtype)


def peft_param(
  module: nn.Module,
  name: str,
  init: Start | Callable,
  shape: tuple[int, ...],
  letters: str,
) -> Array:
  """A trainable array of an adapter or router, float32 [shape].

  A stored array of another shape is an error that names both.

  Args:
    init: `Normal`, `Fill`, or a function (key, shape, dtype) -> array where
      the start depends on the base's weights (DoRA's magnitude).
    letters: one for each axis of `shape`, as in the legend.
  """
  start = init if isinstance(init, Start) else None
  _tell(module, name, shape, Label(COLLECTION, letters, start))
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


def _tell(module: nn.Module, name: str, shape, label: Label) -> None:
  """Leaves the array's label where whoever asked by an rng finds it."""
  if not module.has_rng(LABELS):
    return
  if len(label.letters) != len(shape):
    path = '/'.join((*module.path, name))
    raise ValueError(
      f'{path}: expected a letter for each axis of {shape}; got '
      f'{label.letters!r}'
    )
  module.variable(LABELS, name, lambda: label)
