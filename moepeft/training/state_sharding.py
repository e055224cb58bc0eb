# SPDX-License-Identifier: Apache-2.0
"""Shardings of a training state's arrays, by the rules of `core.sharding`."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moepeft.core import sharding
from moepeft.core.sharding import Layout
from moepeft.core.types import State, Tree


def tree_shardings(layout: Layout, logical_axes: Tree, tree: Tree) -> Tree:
  """A NamedSharding for each array, or shape, of a tree."""
  return jax.tree.map(
    lambda axes, leaf: NamedSharding(
      layout.mesh, sharding.spec(layout, axes, leaf.shape)
    ),
    logical_axes,
    tree,
  )


def state_shardings(
  layout: Layout, state: State, logical_axes: dict[str, Tree], trainable: str
) -> State:
  """A state of NamedShardings: for `place`, restoring and jit.

  An optimizer array has the sharding of the parameter whose path its own path
  ends with. An array with fewer axes (Adafactor's factored moments) has the
  sharding of the axes that remain. It is replicated if the sizes do not
  determine those axes, or if it belongs to no parameter.

  Args:
    state: arrays or shapes.
    logical_axes: {'params': ..., 'peft': ...} of `initializers.logical_axes`.
    trainable: 'params' or 'peft', the part that is trained.
  """
  trained, frozen = _by_part(logical_axes, trainable)
  trained = tree_shardings(layout, trained, state.trainable)
  return State(
    step=layout.replicated,
    trainable=trained,
    frozen=tree_shardings(layout, frozen, state.frozen),
    opt=_optimizer_shardings(layout, state.opt, state.trainable, trained),
    rng=layout.replicated,
    reference=jax.tree.map(lambda _: layout.replicated, state.reference),
  )


def _by_part(
  logical_axes: dict[str, Tree], trainable: str
) -> tuple[Tree, Tree]:
  frozen = {'peft': 'params', 'params': 'peft'}[trainable]
  return logical_axes[trainable], logical_axes[frozen]


def _optimizer_shardings(
  layout: Layout, opt: Tree, params: Tree, shardings: Tree
) -> Tree:
  owners = {
    path: (leaf.shape, array_sharding.spec)
    for (path, leaf), array_sharding in zip(
      _paths(params), jax.tree.leaves(shardings), strict=True
    )
  }

  def sharding_of(path, leaf) -> NamedSharding:
    parts = _path_name(path).split('/')
    for i in range(len(parts)):
      owner = owners.get('/'.join(parts[i:]))
      if owner:
        return NamedSharding(layout.mesh, _remaining_spec(leaf.shape, *owner))
    return layout.replicated

  return jax.tree_util.tree_map_with_path(sharding_of, opt)


def _remaining_spec(
  shape: tuple[int, ...], full_shape: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec:
  """The spec of an array with a subset of another array's axes."""
  entries = (*spec, *[None] * (len(full_shape) - len(spec)))
  specs = {
    tuple(entries[i] for i in axes)
    for axes in itertools.combinations(range(len(full_shape)), len(shape))
    if shape == tuple(full_shape[i] for i in axes)
  }
  return (
    sharding.canonical_spec(*specs.pop())
    if len(specs) == 1
    else PartitionSpec()
  )


def place(
  state: State, shardings: State, init: Callable[[Tree], Tree]
) -> State:
  """The state on its devices.

  Args:
    state: host arrays; an array that is on its device already is not copied,
      so that a donated step can reuse it. `opt` may be shapes.
    shardings: from `state_shardings`.
    init: the optimizer's `init`, jitted with shardings, so that no device
      holds more than its share.
  """
  rest = sharding.put(state.replace(opt=()), shardings.replace(opt=()))
  opt = jax.jit(init, out_shardings=shardings.opt)(rest.trainable)
  return rest.replace(opt=opt)


def describe(
  layout: Layout, state: State, logical_axes: dict[str, Tree], trainable: str
) -> str:
  """A line about the mesh: memory per device, arrays that are not divisible."""
  shardings = state_shardings(layout, state, logical_axes, trainable)
  sizes = ', '.join(f'{k} {v}' for k, v in layout.mesh.shape.items())
  kind = layout.mesh.devices.flat[0].device_kind
  lines = [f'{layout.mesh.size} x {kind} ({sizes})']
  weights = (
    (state.trainable, state.frozen),
    (shardings.trainable, shardings.frozen),
  )
  for name, part in (
    ('weights', weights),
    ('optimizer', (state.opt, shardings.opt)),
  ):
    local, total = _megabytes(*part)
    lines.append(f'{name} per device: {local:.3g} of {total:.3g} MB')
  undivided = []
  for axes, tree in zip(
    _by_part(logical_axes, trainable),
    (state.trainable, state.frozen),
    strict=True,
  ):
    undivided += _undivided_arrays(layout, axes, tree)
  if undivided:
    undivided = [text for _, text in sorted(undivided, reverse=True)]
    more = f' and {len(undivided) - 3} more' if len(undivided) > 3 else ''
    lines.append(f'does not divide: {", ".join(undivided[:3])}{more}')
  return '; '.join(lines)


def _megabytes(tree: Tree, shardings: Tree) -> tuple[float, float]:
  local = total = 0.0
  for leaf, array_sharding in zip(
    jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
  ):
    size = leaf.dtype.itemsize / 1e6
    local += size * math.prod(array_sharding.shard_shape(leaf.shape))
    total += size * math.prod(leaf.shape)
  return local, total


def _undivided_arrays(layout: Layout, logical_axes: Tree, tree: Tree) -> list:
  """(elements, 'path (v=259 by 8)') of arrays that a rule cannot divide."""
  undivided = []
  for (path, leaf), axes in zip(
    _paths(tree), jax.tree.leaves(logical_axes), strict=True
  ):
    spec = sharding.spec(layout, axes, leaf.shape)
    size = dict(zip(axes, leaf.shape, strict=True))
    axis_texts = [
      f'{name}={size[name]} by {layout.mesh.shape[axis]}'
      for name, axis in layout.rules
      if name in size and axis not in spec
      if size[name] % layout.mesh.shape[axis]
    ]
    if axis_texts:
      undivided.append(
        (
          math.prod(leaf.shape),
          f'{path} ({", ".join(dict.fromkeys(axis_texts))})',
        )
      )
  return undivided


def _paths(tree: Tree) -> list[tuple[str, Any]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(_path_name(path), leaf) for path, leaf in flat]


def _path_name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
