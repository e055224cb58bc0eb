# SPDX-License-Identifier: Apache-2.0
"""Router state without gradients, such as load biases and moving averages.

The forward pass reads the state. Once per optimizer step, the entry's `update`
computes the next state from the sums of the whole batch. The state is stored
with the trained parameters of the adapter, under names that begin with
`state_`, so all code that scans, stacks, saves, exports or serves an adapter
includes it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from moepeft.core.types import Array, Tree
from moepeft.moe import ROUTERS
from moepeft.moe.router_stats import RouterStats, collect
from moepeft.nn.initializers import Constant, peft_param

_PREFIX = 'state_'


def router_state(
  module: nn.Module, name: str, shape: tuple[int, ...], axes: str
) -> Array:
  """A router's state, float32 [shape], initially zeros.

  Args:
    name: its key in the dict that `RouterSpec.update` takes.
    axes: as in `peft_param`.
  """
  state = peft_param(module, f'{_PREFIX}{name}', Constant(0), shape, axes)
  return jax.lax.stop_gradient(state)


def against_load(bias: Array, rate: float, sums: RouterStats) -> Array:
  """The next bias [e]: up by `rate` below the mean load, down above it.

  Source: Wang et al., arXiv:2408.15664. The mean is over the experts that the
  layer has; the others' biases stay.
  """
  mean = jnp.sum(sums.share, axis=-1, keepdims=True) / sums.experts
  step = rate * jnp.sign(mean - sums.share)
  return bias + (
    step if sums.available is None else jnp.where(sums.available > 0, step, 0)
  )


def is_state(path: str) -> bool:
  """Whether a path in a 'peft' tree is that of a router's state."""
  return path.rpartition('/')[-1].startswith(_PREFIX)


def split(tree: Tree, frozen_arrays: Collection[str] = ()) -> tuple[Tree, Tree]:
  """Splits a 'peft' tree into (trained, frozen or state).

  Args:
    frozen_arrays: regular expressions of paths; see `peft.build.Built`.
  """
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  rest = {
    path: array
    for path, array in flat.items()
    if is_state(path) or _is_frozen(path, frozen_arrays)
  }
  if not rest:
    return tree, {}
  trained = {path: a for path, a in flat.items() if path not in rest}
  return _unflatten(trained), _unflatten(rest)


def _is_frozen(path: str, frozen_arrays: Collection[str]) -> bool:
  return any(re.search(pattern, path) for pattern in frozen_arrays)


def join(trained: Tree, rest: Tree) -> Tree:
  """The inverse of `split`."""
  if not rest:
    return trained
  flat = flax.traverse_util.flatten_dict(trained, sep='/')
  return _unflatten(flat | flax.traverse_util.flatten_dict(rest, sep='/'))


def optimizer_init(
  optimizer: optax.GradientTransformation, frozen_arrays: Collection[str] = ()
) -> Callable[[Tree], Tree]:
  """An optimizer's `init` for the trained part of a 'peft' tree.

  Args:
    frozen_arrays: as for `split`.
  """
  return lambda tree: optimizer.init(split(tree, frozen_arrays)[0])


def update(rest: Tree, routing: Tree, routers: Mapping[str, nn.Module]) -> Tree:
  """Updates the states in the second tree of `split`, not its frozen arrays.

  Args:
    rest: the second tree of `split`.
    routing: the collection 'routing', the sums over the step's batch.
    routers: {adapter's name: its router}, from `peft.build.routers`.
  """
  updated = flax.traverse_util.flatten_dict(rest, sep='/')
  sites: dict[str, dict[str, Array]] = {}
  for path in filter(is_state, updated):
    site, _, name = path.rpartition('/router/')
    sites.setdefault(site, {})[name.removeprefix(_PREFIX)] = updated[path]
  if not sites:
    return rest
  sums = collect(routing)
  for site, arrays in sites.items():
    arrays = _update_site(routers[site.rpartition('/')[-1]], arrays, sums[site])
    for name, array in arrays.items():
      updated[f'{site}/router/{_PREFIX}{name}'] = array
  return _unflatten(updated)


def _update_site(
  router: nn.Module, arrays: dict[str, Array], sums: RouterStats
) -> dict[str, Array]:
  """The next state of one site, vmapped over its layers if they are stacked."""
  entry = next(r for r in ROUTERS.values() if r.module is type(router))

  def update_layer(arrays, sums):
    return entry.update(router, arrays, sums)

  for _ in range(sums.count.ndim):
    update_layer = jax.vmap(update_layer)
  return update_layer(arrays, sums)


def _unflatten(flat: dict[str, Any]) -> Tree:
  return flax.traverse_util.unflatten_dict(flat, sep='/')
