# SPDX-License-Identifier: Apache-2.0
"""A model's method for n rows, split into three: before its layers, a layer,
and after them.

Each is a program of its own, and the layer's serves all layers: it is compiled
in the time of one, however many there are. One program of SmolLM2's 30 layers
with two buckets of adapters takes 20 s to compile on CPU and a server needs 18,
whose kernels are together more than Linux lets a process map (65,530 areas);
one that scans the layers copies each layer's weights out of their stack at
every token, which doubles a step's time there. On an accelerator, where the
start of a program costs more than a layer, the three are one that scans.

A row has its own cache, positions and adapters; the base's weights are shared.
z is the number of buckets that adapters have.
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
  """A module and the way to a row's adapters.

  Attributes:
    module: its adapter_map is that of the adapter pool.
    row_tree: as of `AdapterPool`.
    routing: whether programs report the experts' weights, else {}.
  """

  module: Any
  row_tree: Callable[..., Tree]
  routing: bool


class _Side(nn.Module):
  """A layer at the path that it has in the model, 'encoder' or 'decoder': an
  adapter may compute with its path, as the router `random` does."""

  block: nn.Module
  side: str

  @nn.compact
  def __call__(self, *args):
    return self.block.clone(parent=self, name=self.side)(*args)


@dataclasses.dataclass(frozen=True)
class LayeredMethod:
  """A method of a model that calls one stack of layers.

  Attributes:
    name: of the module's method.
    side: 'encoder' or 'decoder', the stack that it calls.
    arguments: (stack, *row) -> the method's arguments for one row; `stack` is
      for its `Context`.
    outputs: (result, {path: [n, t, e]}, *rows) -> the program's outputs for
      all rows.
    cut: (a layer's cache, rows [n]) -> those rows of it.
    put: (a layer's cache, rows [n], positions [n], extended cut) -> the cache;
      None where no cache is written.
  """

  model: ServedModel
  name: str
  side: str
  arguments: Callable[..., tuple]
  outputs: Callable[..., Any]
  cut: Callable[[Tree, Array], Tree] = lambda cache, rows: {}
  put: Callable[[Tree, Array, Array, Tree], Tree] | None = None

  def before(self, params: Tree, bank: Tree, adapters: Array, *rows: Array):
    """Computes the arguments of the first layer.

    Args:
      params, bank: what is of no layer; see `split`.
      adapters: int32 [n, z].
      rows: [n, ...] each, the arguments of `arguments`.

    Returns:
      x [n, 1, t, d] and (context, further arguments).
    """

    def of_row(adapters, *row):
      calls = []
      self._apply(params, bank, adapters, row, lambda *a: _record(calls, *a))
      ((_, _, x, ctx, args),) = calls
      return x, (ctx, args)

    return jax.vmap(of_row)(adapters, *rows)

  def layer(
    self,
    params: Tree,
    bank: Tree,
    cache: Tree,
    adapters: Array,
    rows: Array,
    positions: Array,
    number: Array,
    x: Array,
    flow: tuple[Context, tuple],
    block: Any,
  ) -> tuple[Array, Tree, dict[str, Array]]:
    """Computes one layer.

    Args:
      params: this layer's; bank: all layers'.
      cache: this layer's, [slots, ...].
      rows: int32 [n], slots; positions: int32 [n], of each row's first token.
      number: int32 scalar, the layer's.
      block: of `block`.

    Returns:
      x, the cache, and the experts' weights.
    """

    def of_row(adapters, cache, x, flow):
      ctx, args = flow
      peft = self.model.row_tree(bank, adapters, number)
      variables = {'params': params, 'peft': peft}
      if cache:
        variables['cache'] = cache
      variables = {key: {self.side: tree} for key, tree in variables.items()}
      ctx = ctx.replace(layer=number)
      x, changed = module.apply(
        variables, x, ctx, *args, mutable=['cache', 'weights']
      )
      weights = changed.get('weights', {})
      weights = expert_weights(weights) if self.model.routing else {}
      return x, changed.get('cache', {}).get(self.side, {}), weights

    module = _Side(block, self.side)
    row_cache = self.cut(cache, rows)
    x, row_cache, weights = jax.vmap(of_row)(adapters, row_cache, x, flow)
    if self.put is None:
      return x, {}, weights
    return x, self.put(cache, rows, positions, row_cache), weights

  def after(
    self,
    params: Tree,
    bank: Tree,
    adapters: Array,
    x: Array,
    layer_weights: Sequence[dict[str, Array]],
    *rows: Array,
  ) -> Any:
    """Computes the outputs from the last layer's x.

    Args:
      layer_weights: the experts' weights of each layer.
    """

    def of_row(adapters, x, *row):
      stack = lambda *_: x  # noqa: E731
      return self._apply(params, bank, adapters, row, stack)

    result, weights = jax.vmap(of_row)(adapters, x, *rows)
    mean = lambda *a: jnp.mean(jnp.stack(a), axis=0)  # noqa: E731
    weights |= jax.tree.map(mean, *layer_weights)
    return self.outputs(result, weights, *rows)

  def block(self, *args: Any) -> Any:
    """A layer's module.

    Args:
      args: shapes of the arguments of `before`.
    """
    calls = []

    def of_row(params, bank, adapters, *rows):
      row = [a[0] for a in rows]
      record = lambda *a: _record(calls, *a)  # noqa: E731
      self._apply(params, bank, adapters[0], row, record)

    jax.eval_shape(of_row, *args)
    ((block, *_),) = calls
    return block

  def _apply(self, params, bank, adapters, row, stack):
    """Calls the module's method with a function in place of its layers.

    Computations that do not reach the layers' arguments, or do not depend on
    their result, are removed by the compiler.
    """
    model = self.model
    variables = {'params': params, 'peft': model.row_tree(bank, adapters)}
    result, changed = model.module.apply(
      variables,
      *self.arguments(stack, *row),
      method=self.name,
      mutable=['weights'],
    )
    weights = changed.get('weights', {})
    return result, expert_weights(weights) if model.routing else {}


def expert_weights(collection: Tree) -> dict[str, Array]:
  """{site and adapter: float32 [t, e]}, means over layers and heads.

  Args:
    collection: sown in one row, [1, t, (heads,) e] each, layers scanned or not.
  """
  by_path: dict[str, list[Array]] = {}
  _collect(collection, (), False, by_path)
  return {
    path: jnp.mean(jnp.stack(layers), axis=0).astype(jnp.float32)
    for path, layers in by_path.items()
  }


def _collect(tree, path, scanned, by_path):
  for key, value in tree.items():
    if isinstance(value, dict):
      is_layer = key.partition('_')[0] == 'layers'
      inner = path if is_layer else (*path, key)
      _collect(value, inner, scanned or key == 'layers', by_path)
      continue
    # Sown values are tuples, one for each call.
    for a in value:
      a = jnp.mean(a, axis=0) if scanned else a
      a = jnp.mean(a[0].reshape(a.shape[1], -1, a.shape[-1]), axis=1)
      by_path.setdefault('/'.join(path), []).append(a)


def split(tree: Tree) -> tuple[Tree, dict[str, Tree]]:
  """A model's tree without its layers, and {side: its layers}, if any."""
  rest, layers = {}, {}
  for key, value in tree.items():
    rest[key] = value
    if isinstance(value, dict) and 'layers' in value:
      rest[key] = {k: v for k, v in value.items() if k != 'layers'}
      layers[key] = value['layers']
  return rest, layers


def split_bank(bank: Tree) -> tuple[Tree, dict[str, Tree]]:
  """`split` of every bucket: {bucket: tree}, and {side: {bucket: tree}}."""
  rest, sides = {}, {}
  for bucket, tree in bank.items():
    rest[bucket], layers = split(tree)
    for side, side_layers in layers.items():
      sides.setdefault(side, {})[bucket] = side_layers
  # Every bucket has an entry in a row's slots.
  return rest, {
    side: {bucket: buckets.get(bucket, {}) for bucket in bank}
    for side, buckets in sides.items()
  }


def _record(calls: list, block, length, x, ctx, args) -> Array:
  calls.append((block, length, x, ctx, args))
  return x
