# SPDX-License-Identifier: Apache-2.0
"""A model's method for n rows: what comes before its layers, a layer, the rest.

Each is a program of its own, and the layer's serves all layers: it is compiled
in the time of one, however many there are. One program of SmolLM2's 30 layers
with two forms of adapters takes 20 s to compile on CPU and a server needs 18,
whose kernels are together more than Linux lets a process map (65,530 areas);
one that scans the layers copies each layer's weights out of their stack at
every token, which doubles a step's time there. On an accelerator, where the
start of a program costs more than a layer, the three are one that scans.

A row has its own cache, places and adapters; the base's weights are shared.
z is the number of forms that adapters have.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context, Tree


def weights(collection: Tree) -> dict[str, Array]:
  """{site and adapter: float32 [t, e]}, means over layers and heads.

  Args:
    collection: of one row, [1, t, (heads,) e] each, layers scanned or not.
  """
  found: dict[str, list[Array]] = {}
  _walk(collection, (), False, found)
  return {
    path: jnp.mean(jnp.stack(of_layers), axis=0).astype(jnp.float32)
    for path, of_layers in found.items()
  }


def _walk(tree, path, scanned, found):
  for key, value in tree.items():
    if isinstance(value, dict):
      of_layer = key.partition('_')[0] == 'layers'
      inner = path if of_layer else (*path, key)
      _walk(value, inner, scanned or key == 'layers', found)
      continue
    # Sown values are tuples, one for each call.
    for a in value:
      a = jnp.mean(a, axis=0) if scanned else a
      a = jnp.mean(a[0].reshape(a.shape[1], -1, a.shape[-1]), axis=1)
      found.setdefault('/'.join(path), []).append(a)


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """What every method is of.

  Attributes:
    module: with the pool's adapter map.
    row_tree: of the banks.
    routing: whether experts are told, else {}.
  """

  module: Any
  row_tree: Callable[..., Tree]
  routing: bool


@dataclasses.dataclass(frozen=True)
class LayeredMethod:
  """A method that calls one stack of layers.

  Attributes:
    name: of the module's method.
    side: 'encoder' or 'decoder', whose layers it calls.
    ask: (stack, *row) -> the method's arguments for one row; `stack` is for
      its `Context`.
    say: (result, {path: [n, t, e]}) -> what comes of it for all rows.
    cut: (a layer's cache, rows [n]) -> those rows of it.
    put: (a layer's cache, rows [n], places [n], what came of the cut) -> it;
      None where nothing is kept.
  """

  model: ServedModel
  name: str
  side: str
  ask: Callable[..., tuple]
  say: Callable[[Any, dict[str, Array]], Any]
  cut: Callable[[Tree, Array], Tree] = lambda cache, rows: {}
  put: Callable[[Tree, Array, Array, Tree], Tree] | None = None

  def before(self, params: Tree, bank: Tree, adapters: Array, *rows: Array):
    """What the layers are called with.

    Args:
      params, bank: what is of no layer; see `split`.
      adapters: int32 [n, z].
      rows: [n, ...] each, what `ask` takes.

    Returns:
      x [n, 1, t, d] and (context, further arguments).
    """

    def one(adapters, *row):
      found = []
      self._apply(params, bank, adapters, row, lambda *a: _note(found, *a))
      ((_, _, x, ctx, args),) = found
      return x, (ctx, args)

    return jax.vmap(one)(adapters, *rows)

  def layer(
    self,
    params: Tree,
    bank: Tree,
    cache: Tree,
    adapters: Array,
    rows: Array,
    places: Array,
    number: Array,
    x: Array,
    flow: tuple[Context, tuple],
    block: Any,
  ) -> tuple[Array, Tree, dict[str, Array]]:
    """
    Args:
      params: this layer's; bank: all layers'.
      cache: this layer's, [slots, ...].
      rows: int32 [n], slots; places: int32 [n], where the first token stands.
      number: int32 scalar, the layer's.
      block: of `block`.

    Returns:
      x, the cache, and the weights of experts.
    """

    def one(adapters, cache, x, flow):
      ctx, args = flow
      peft = self.model.row_tree(bank, adapters, number)
      variables = {'params': params, 'peft': peft}
      if cache:
        variables['cache'] = cache
      ctx = ctx.replace(layer=number)
      x, changed = block.apply(
        variables, x, ctx, *args, mutable=['cache', 'weights']
      )
      told = {self.side: {'layers_0': changed.get('weights', {})}}
      told = weights(told) if self.model.routing else {}
      return x, changed.get('cache', {}), told

    own = self.cut(cache, rows)
    x, own, told = jax.vmap(one)(adapters, own, x, flow)
    return x, self.put(cache, rows, places, own) if self.put else {}, told

  def after(
    self,
    params: Tree,
    bank: Tree,
    adapters: Array,
    x: Array,
    told: Sequence[dict[str, Array]],
    *rows: Array,
  ) -> Any:
    """What is said, of the last layer's x and of what all layers told."""

    def one(adapters, x, *row):
      stack = lambda *_: x  # noqa: E731
      return self._apply(params, bank, adapters, row, stack)

    result, own = jax.vmap(one)(adapters, x, *rows)
    told = jax.tree.map(lambda *a: jnp.mean(jnp.stack(a), axis=0), *told)
    return self.say(result, own | told)

  def block(self, *args: Any) -> tuple[Any, int]:
    """A layer's module, and how many there are.

    Args:
      args: shapes of what `before` takes.
    """
    found = []

    def one(params, bank, adapters, *rows):
      row = [a[0] for a in rows]
      note = lambda *a: _note(found, *a)  # noqa: E731
      self._apply(params, bank, adapters[0], row, note)

    jax.eval_shape(one, *args)
    ((block, length, _, _, _),) = found
    return block, length

  def _apply(self, params, bank, adapters, row, stack):
    """The module's method, with something else for its layers.

    What the layers' result does not reach is left out by the compiler.
    """
    model = self.model
    variables = {'params': params, 'peft': model.row_tree(bank, adapters)}
    result, changed = model.module.apply(
      variables, *self.ask(stack, *row), method=self.name, mutable=['weights']
    )
    told = weights(changed.get('weights', {})) if model.routing else {}
    return result, told


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
  """`split` of every form: {form: tree}, and {side: {form: tree}}."""
  rest, sides = {}, {}
  for form, tree in bank.items():
    rest[form], layers = split(tree)
    for side, own in layers.items():
      sides.setdefault(side, {})[form] = own
  # Every form has a place in a row's numbers.
  return rest, {
    side: {form: found.get(form, {}) for form in bank}
    for side, found in sides.items()
  }


def _note(found: list, block, length, x, ctx, args) -> Array:
  found.append((block, length, x, ctx, args))
  return x
