# SPDX-License-Identifier: Apache-2.0
"""A model's method for n rows, in three programs: before, a layer, and after.

All layers share the layer's program, so the compile time does not grow with
their number. On CPU the alternatives are worse. A program with all 30 layers of
SmolLM2 and two buckets of adapters takes 20 s to compile; a server needs 18 of
them, and their kernels exceed the 65,530 memory areas that Linux lets a process
map. A program that scans over the layers copies each layer's weights out of the
stack at every token, which doubles the time of a step. On an accelerator a
program's launch costs more than a layer, so there one program scans.

Each row has its own cache, positions and adapters; the base weights are shared.
z is the number of adapter buckets.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context, Tree


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A model, and the function that selects the adapters of a row.

  Attributes:
    module: the Flax module, with the adapter_map of the adapter pool.
    row_tree: see `adapters.stacking.row_tree`.
    routing: whether programs return the experts' weights; otherwise they return
      {}.
    reads_prompt: whether a router reads the whole prompt.
    embedding_size: the size of the embeddings that mixtures read; 0 for none.
  """

  module: Any
  row_tree: Callable[..., Tree]
  routing: bool
  reads_prompt: bool = False
  embedding_size: int = 0

  def embeddings(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of the embeddings of n rows among the inputs of routers."""
    if not self.embedding_size:
      return {}
    shape = n, self.embedding_size
    return {'embeddings': jax.ShapeDtypeStruct(shape, jnp.float32)}

  def fields(self, inputs: dict[str, Array]) -> dict[str, Array]:
    """The fields of a row's Context with the inputs of routers.

    Args:
      inputs: of one row, where the model has mixtures that read them:
        `first_pass` [t, d] and `embeddings` [i].
    """
    fields = {name: array[None] for name, array in inputs.items()}
    if 'embeddings' in fields:
      fields['embeddings'] = fields['embeddings'][None]
    return fields

  @property
  def two_pass(self) -> bool:
    """Whether a first pass of the base precedes each call."""
    return self.module.adapter_map.two_pass


class _Side(nn.Module):
  """A layer below 'encoder' or 'decoder', its path in the model.

  The path matters: the router `random` derives its weights from it.
  """

  block: nn.Module
  side: str

  @nn.compact
  def __call__(self, *args):
    return self.block.clone(parent=self, name=self.side)(*args)


@dataclasses.dataclass(frozen=True)
class LayeredMethod:
  """A method of a model that calls one stack of layers.

  Attributes:
    name: the name of the module's method.
    side: 'encoder' or 'decoder', the stack of layers that the method calls.
    arguments: (stack, *row) -> the method's arguments for one row; `stack`
      becomes `Context.run_layers`.
    outputs: (result, {path: experts' weights [n, t, l, e]}, *rows) -> the
      outputs of the program for all rows.
    read_cache: (a layer's cache, slots [n]) -> the caches of those slots.
    write_cache: (a layer's cache, slots [n], positions [n], new caches of those
      slots) -> the layer's cache; None if the method writes no cache.
  """

  model: ServedModel
  name: str
  side: str
  arguments: Callable[..., tuple]
  outputs: Callable[..., Any]
  read_cache: Callable[[Tree, Array], Tree] = lambda cache, rows: {}
  write_cache: Callable[[Tree, Array, Array, Tree], Tree] | None = None

  def before(
    self, params: Tree, adapter_params: Tree, adapters: Array, *rows: Array
  ):
    """Computes the arguments of the first layer.

    Args:
      params, adapter_params: the arrays outside of the layers; see `split`.
      adapters: int32 [n, z], each row's slot in each bucket.
      rows: [n, ...] each, the inputs of `arguments`.

    Returns:
      x [n, 1, t, d], and (context, the layer's other arguments).
    """

    def compute_row(adapters, *row):
      calls = []
      self._apply(
        params, adapter_params, adapters, row, lambda *a: _record(calls, *a)
      )
      ((_, _, x, ctx, args),) = calls
      return x, (ctx, args)

    return jax.vmap(compute_row)(adapters, *rows)

  def layer(
    self,
    params: Tree,
    adapter_params: Tree,
    cache: Tree,
    adapters: Array,
    rows: Array,
    positions: Array,
    layer_index: Array,
    x: Array,
    layer_args: tuple[Context, tuple],
    block: Any,
  ) -> tuple[Array, Tree, dict[str, Array]]:
    """Computes one layer.

    Args:
      params: the layer's parameters.
      adapter_params: the adapters' arrays of all layers.
      cache: the layer's cache, [slots, ...].
      rows: int32 [n], the slot of each row.
      positions: int32 [n], the position of each row's first token.
      layer_index: int32 scalar.
      block: the layer's module, from `block`.

    Returns:
      x, the cache, and {path: experts' weights [n, t, 1, e]}.
    """

    def compute_row(adapters, cache, x, layer_args):
      ctx, args = layer_args
      peft = self.model.row_tree(adapter_params, adapters, layer_index)
      variables = {'params': params, 'peft': peft}
      if cache:
        variables['cache'] = cache
      variables = {key: {self.side: tree} for key, tree in variables.items()}
      ctx = ctx.at_layer(layer_index)
      x, updates = module.apply(
        variables, x, ctx, *args, mutable=['cache', 'weights']
      )
      weights = updates.get('weights', {})
      weights = expert_weights(weights) if self.model.routing else {}
      return x, updates.get('cache', {}).get(self.side, {}), weights

    module = _Side(block, self.side)
    slot_caches = self.read_cache(cache, rows)
    x, slot_caches, weights = jax.vmap(compute_row)(
      adapters, slot_caches, x, layer_args
    )
    if self.write_cache is None:
      return x, {}, weights
    return x, self.write_cache(cache, rows, positions, slot_caches), weights

  def after(
    self,
    params: Tree,
    adapter_params: Tree,
    adapters: Array,
    x: Array,
    layer_weights: Sequence[dict[str, Array]],
    *rows: Array,
  ) -> Any:
    """Computes the outputs from the last layer's x.

    Args:
      layer_weights: for each layer, its experts' weights as `layer` returns
        them.
    """

    def compute_row(adapters, x, *row):
      stack = lambda *_: x  # noqa: E731
      return self._apply(params, adapter_params, adapters, row, stack)

    result, weights = jax.vmap(compute_row)(adapters, x, *rows)
    stack = lambda *a: jnp.concatenate(a, axis=2)  # noqa: E731
    weights |= jax.tree.map(stack, *layer_weights)
    return self.outputs(result, weights, *rows)

  def block(self, *args: Any) -> Any:
    """Returns the Flax module of a layer.

    Args:
      args: the shapes of the arguments of `before`.
    """
    calls = []

    def compute_row(params, adapter_params, adapters, *rows):
      row = jax.tree.map(lambda a: a[0], rows)
      record = lambda *a: _record(calls, *a)  # noqa: E731
      self._apply(params, adapter_params, adapters[0], row, record)

    jax.eval_shape(compute_row, *args)
    ((block, *_),) = calls
    return block

  def _apply(self, params, adapter_params, adapters, row, stack):
    """Calls the module's method with `stack` in place of its layers.

    The compiler removes computations that a program's outputs do not need.
    """
    model = self.model
    variables = {
      'params': params,
      'peft': model.row_tree(adapter_params, adapters),
    }
    result, updates = model.module.apply(
      variables,
      *self.arguments(stack, *row),
      method=self.name,
      mutable=['weights'],
    )
    weights = updates.get('weights', {})
    return result, expert_weights(weights) if model.routing else {}


def expert_weights(collection: Tree) -> dict[str, Array]:
  """The experts' weights of one row, averaged over heads.

  Args:
    collection: the sown weights, [1, t, (heads,) e] each, with a leading layer
      axis if the layers are scanned.

  Returns:
    {'path of the target module/adapter': float32 [t, l, e]}.
  """
  by_path: dict[str, list[Array]] = {}
  _collect(collection, (), False, by_path)
  return {
    path: jnp.concatenate(layers).swapaxes(0, 1).astype(jnp.float32)
    for path, layers in by_path.items()
  }


def _collect(tree, path, scanned, by_path):
  for key, value in tree.items():
    if isinstance(value, dict):
      is_layer = key.partition('_')[0] == 'layers'
      inner = path if is_layer else (*path, key)
      _collect(value, inner, scanned or key == 'layers', by_path)
      continue
    # A sown value is a tuple with an entry for each call.
    a = jnp.mean(jnp.stack(value), axis=0)
    a = a if scanned else a[None]
    layers, _, t, *_, e = a.shape
    a = jnp.mean(a.reshape(layers, t, -1, e), axis=2)
    by_path.setdefault('/'.join(path), []).append(a)


def split(tree: Tree) -> tuple[Tree, dict[str, Tree]]:
  """Splits a tree into (all but the layers, {side: layers})."""
  outer, layers = {}, {}
  for key, value in tree.items():
    outer[key] = value
    if isinstance(value, dict) and 'layers' in value:
      outer[key] = {k: v for k, v in value.items() if k != 'layers'}
      layers[key] = value['layers']
  return outer, layers


def split_adapters(adapter_params: Tree) -> tuple[Tree, dict[str, Tree]]:
  """Splits every bucket into ({bucket: outer}, {side: {bucket: layers}})."""
  outer, sides = {}, {}
  for bucket, tree in adapter_params.items():
    outer[bucket], layers = split(tree)
    for side, side_layers in layers.items():
      sides.setdefault(side, {})[bucket] = side_layers
  # A row has a slot in every bucket, so every side needs every bucket.
  return outer, {
    side: {bucket: buckets.get(bucket, {}) for bucket in adapter_params}
    for side, buckets in sides.items()
  }


def _record(calls: list, block, length, x, ctx, args) -> Array:
  calls.append((block, length, x, ctx, args))
  return x
