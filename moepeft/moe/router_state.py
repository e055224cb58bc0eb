# SPDX-License-Identifier: Apache-2.0
"""State of routers that no gradient trains: load biases, moving averages.

The forward pass reads it; once per optimizer step the entry's `update` makes
the next one from the sums of the whole batch. It is stored beside the trained
parameters of the adapter, under names that begin with `state_`, so that
whatever scans, stacks, saves, exports or serves an adapter has its state too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import optax

from moepeft.core.types import Array, Tree
from moepeft.moe import ROUTERS
from moepeft.moe.router_stats import RouterStats, collect
from moepeft.nn.initializers import Constant, peft_param

_PREFIX = 'state_'


def router_state(
  module: nn.Module, name: str, shape: tuple[int, ...], axes: str
) -> Array:
  """A router's state, float32 [shape], zeros at first.

  Args:
    name: its key in the dict that `RouterSpec.update` takes.
    axes: as in `peft_param`.
  """
  stored = peft_param(module, f'{_PREFIX}{name}', Constant(0), shape, axes)
  return jax.lax.stop_gradient(stored)


def is_state(path: str) -> bool:
  """Whether an array of a 'peft' tree is a router's state, by its path."""
  return path.rpartition('/')[-1].startswith(_PREFIX)


def split(tree: Tree) -> tuple[Tree, Tree]:
  """(what is trained, the routers' state) of a 'peft' tree."""
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  state = {path: array for path, array in flat.items() if is_state(path)}
  if not state:
    return tree, {}
  trained = {path: a for path, a in flat.items() if path not in state}
  return _unflatten(trained), _unflatten(state)


def join(trained: Tree, state: Tree) -> Tree:
  """The inverse of `split`."""
  if not state:
    return trained
  flat = flax.traverse_util.flatten_dict(trained, sep='/')
  return _unflatten(flat | flax.traverse_util.flatten_dict(state, sep='/'))


def optimizer_init(
  optimizer: optax.GradientTransformation,
) -> Callable[[Tree], Tree]:
  """An optimizer's `init` of a 'peft' tree: nothing for routers' state."""
  return lambda tree: optimizer.init(split(tree)[0])


def update(
  state: Tree, routing: Tree, routers: Mapping[str, nn.Module]
) -> Tree:
  """The state after a step.

  Args:
    state: from `split`.
    routing: the sums of the step's batch, the collection 'routing'.
    routers: {adapter's name: its router}, of `peft.build.routers`.
  """
  if not state:
    return state
  flat = flax.traverse_util.flatten_dict(state, sep='/')
  sites: dict[str, dict[str, Array]] = {}
  for path, array in flat.items():
    site, _, name = path.rpartition('/router/')
    sites.setdefault(site, {})[name.removeprefix(_PREFIX)] = array
  sums = collect(routing)
  updated = {}
  for site, arrays in sites.items():
    arrays = _updated(routers[site.rpartition('/')[-1]], arrays, sums[site])
    for name, array in arrays.items():
      updated[f'{site}/router/{_PREFIX}{name}'] = array
  return _unflatten(updated)


def _updated(
  router: nn.Module, arrays: dict[str, Array], sums: RouterStats
) -> dict[str, Array]:
  """The state of one site; layers, where they are stacked, one by one."""
  entry = next(r for r in ROUTERS.values() if r.module is type(router))

  def update_layer(arrays, sums):
    return entry.update(router, arrays, sums)

  for _ in range(sums.count.ndim):
    update_layer = jax.vmap(update_layer)
  return update_layer(arrays, sums)


def _unflatten(flat: dict[str, Any]) -> Tree:
  return flax.traverse_util.unflatten_dict(flat, sep='/')
