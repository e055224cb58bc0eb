# SPDX-License-Identifier: Apache-2.0
"""Shardings of the arrays of a training state, by the rules of `sharding`."""

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

  The optimizer's arrays lie as the parameters that they belong to, by the end
  of their path. One with fewer axes (Adafactor's factored moments) lies as
  the axes that are left; where sizes do not tell which those are, and where
  it belongs to no parameter, every device holds all of it.

  Args:
    state: of arrays or shapes.
    logical_axes: {'params': ..., 'peft': ...}, of `initializers.logical_axes`.
    trainable: which of the two is trained.
  """
  trained, frozen = _by_part(logical_axes, trainable)
  trained = tree_shardings(layout, trained, state.trainable)
  return State(
    step=layout.replicated,
    trainable=trained,
    frozen=tree_shardings(layout, frozen, state.frozen),
    opt=_follow(layout, state.opt, state.trainable, trained),
    rng=layout.replicated,
    reference=jax.tree.map(lambda _: layout.replicated, state.reference),
  )


def _by_part(
  logical_axes: dict[str, Tree], trainable: str
) -> tuple[Tree, Tree]:
  frozen = {'peft': 'params', 'params': 'peft'}[trainable]
  return logical_axes[trainable], logical_axes[frozen]


def _follow(layout: Layout, opt: Tree, params: Tree, shardings: Tree) -> Tree:
  owners = {
    path: (leaf.shape, at.spec)
    for (path, leaf), at in zip(
      _paths(params), jax.tree.leaves(shardings), strict=True
    )
  }

  def sharding_of(path, leaf) -> NamedSharding:
    parts = _text(path).split('/')
    for i in range(len(parts)):
      owner = owners.get('/'.join(parts[i:]))
      if owner:
        return NamedSharding(layout.mesh, _remaining_spec(leaf.shape, *owner))
    return layout.replicated

  return jax.tree_util.tree_map_with_path(sharding_of, opt)


def _remaining_spec(
  shape: tuple[int, ...], full_shape: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec:
  """The spec of an array that has some of the axes of another one."""
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
    state: of host arrays; one that is on its device already is not copied, so
      that a donated step takes it over. `opt` may be shapes only.
    shardings: from `state_shardings`.
    init: the optimizer's, called on the devices, so that no device ever holds
      more than its share.
  """
  rest = sharding.put(state.replace(opt=()), shardings.replace(opt=()))
  opt = jax.jit(init, out_shardings=shardings.opt)(rest.trainable)
  return rest.replace(opt=opt)


def describe(
  layout: Layout, state: State, logical_axes: dict[str, Tree], trainable: str
) -> str:
  """A line on the devices: memory on each, and arrays that do not divide."""
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
  misfits = []
  for axes, tree in zip(
    _by_part(logical_axes, trainable),
    (state.trainable, state.frozen),
    strict=True,
  ):
    misfits += _misfits(layout, axes, tree)
  if misfits:
    misfits = [text for _, text in sorted(misfits, reverse=True)]
    more = f' and {len(misfits) - 3} more' if len(misfits) > 3 else ''
    lines.append(f'does not divide: {", ".join(misfits[:3])}{more}')
  return '; '.join(lines)


def _megabytes(tree: Tree, shardings: Tree) -> tuple[float, float]:
  local = total = 0.0
  for leaf, at in zip(
    jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
  ):
    size = leaf.dtype.itemsize / 1e6
    local += size * math.prod(at.shard_shape(leaf.shape))
    total += size * math.prod(leaf.shape)
  return local, total


def _misfits(layout: Layout, logical_axes: Tree, tree: Tree) -> list:
  """(elements, 'path (v=259 by 8)') of arrays that a rule cannot spread."""
  misfits = []
  for (path, leaf), axes in zip(
    _paths(tree), jax.tree.leaves(logical_axes), strict=True
  ):
    spec = sharding.spec(layout, axes, leaf.shape)
    size = dict(zip(axes, leaf.shape, strict=True))
    odd = [
      f'{name}={size[name]} by {layout.mesh.shape[axis]}'
      for name, axis in layout.rules
      if name in size and axis not in spec
      if size[name] % layout.mesh.shape[axis]
    ]
    if odd:
      misfits.append(
        (math.prod(leaf.shape), f'{path} ({", ".join(dict.fromkeys(odd))})')
      )
  return misfits


def _paths(tree: Tree) -> list[tuple[str, Any]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(_text(path), leaf) for path, leaf in flat]


def _text(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
