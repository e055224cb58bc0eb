# SPDX-License-Identifier: Apache-2.0
"""Where the arrays of a training state lie, by the rules of `sharding`."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moepeft.core import sharding
from moepeft.core.sharding import Layout
from moepeft.core.types import State, Tree


def tree_shardings(layout: Layout, letters: Tree, tree: Tree) -> Tree:
  """A NamedSharding for each array, or shape, of a tree."""
  return jax.tree.map(
    lambda own, leaf: NamedSharding(
      layout.mesh, sharding.spec(layout, own, leaf.shape)
    ),
    letters,
    tree,
  )


def state_shardings(
  layout: Layout, state: State, letters: dict[str, Tree], trainable: str
) -> State:
  """A state of NamedShardings: for `place`, restoring and jit.

  The optimizer's arrays lie as the parameters that they belong to, by the end
  of their path. One with fewer axes (Adafactor's factored moments) lies as
  the axes that are left; where sizes do not tell which those are, and where
  it belongs to no parameter, every device holds all of it.

  Args:
    state: of arrays or shapes.
    letters: {'params': ..., 'peft': ...}, of `initializers.logical_axes`.
    trainable: which of the two is trained.
  """
  trained, frozen = _by_part(letters, trainable)
  trained = tree_shardings(layout, trained, state.trainable)
  return State(
    step=layout.whole,
    trainable=trained,
    frozen=tree_shardings(layout, frozen, state.frozen),
    opt=_follow(layout, state.opt, state.trainable, trained),
    rng=layout.whole,
    reference=jax.tree.map(lambda _: layout.whole, state.reference),
  )


def _by_part(letters: dict[str, Tree], trainable: str) -> tuple[Tree, Tree]:
  other = {'peft': 'params', 'params': 'peft'}[trainable]
  return letters[trainable], letters[other]


def _follow(layout: Layout, opt: Tree, params: Tree, where: Tree) -> Tree:
  owners = {
    path: (leaf.shape, at.spec)
    for (path, leaf), at in zip(
      _paths(params), jax.tree.leaves(where), strict=True
    )
  }

  def one(path, leaf) -> NamedSharding:
    parts = _text(path).split('/')
    for i in range(len(parts)):
      owner = owners.get('/'.join(parts[i:]))
      if owner:
        return NamedSharding(layout.mesh, _left(leaf.shape, *owner))
    return layout.whole

  return jax.tree_util.tree_map_with_path(one, opt)


def _left(shape, whole, spec: PartitionSpec) -> PartitionSpec:
  """The spec of an array of some of another's axes."""
  entries = (*spec, *[None] * (len(whole) - len(spec)))
  found = {
    tuple(entries[i] for i in kept)
    for kept in itertools.combinations(range(len(whole)), len(shape))
    if shape == tuple(whole[i] for i in kept)
  }
  return sharding.trimmed(*found.pop()) if len(found) == 1 else PartitionSpec()


def place(state: State, where: State, init: Callable[[Tree], Tree]) -> State:
  """The state on its devices.

  Args:
    state: of host arrays; one that is on its device already is not copied, so
      that a donated step takes it over. `opt` may be shapes only.
    where: of `state_shardings`.
    init: the optimizer's, called on the devices, so that no device ever holds
      more than its share.
  """
  rest = sharding.put(state.replace(opt=()), where.replace(opt=()))
  opt = jax.jit(init, out_shardings=where.opt)(rest.trainable)
  return rest.replace(opt=opt)


def describe(
  layout: Layout, state: State, letters: dict[str, Tree], trainable: str
) -> str:
  """The devices, what each holds, and what could not be spread: one line."""
  where = state_shardings(layout, state, letters, trainable)
  sizes = ', '.join(f'{k} {v}' for k, v in layout.mesh.shape.items())
  kind = layout.mesh.devices.flat[0].device_kind
  lines = [f'{layout.mesh.size} x {kind} ({sizes})']
  weights = (state.trainable, state.frozen), (where.trainable, where.frozen)
  for name, part in (
    ('weights', weights),
    ('optimizer', (state.opt, where.opt)),
  ):
    held, whole = _megabytes(*part)
    lines.append(f'{name} per device: {held:.3g} of {whole:.3g} MB')
  odd = []
  for own, tree in zip(
    _by_part(letters, trainable), (state.trainable, state.frozen), strict=True
  ):
    odd += _misfits(layout, own, tree)
  if odd:
    odd = [text for _, text in sorted(odd, reverse=True)]
    more = f' and {len(odd) - 3} more' if len(odd) > 3 else ''
    lines.append(f'does not divide: {", ".join(odd[:3])}{more}')
  return '; '.join(lines)


def _megabytes(tree: Tree, where: Tree) -> tuple[float, float]:
  held = whole = 0.0
  for leaf, at in zip(
    jax.tree.leaves(tree), jax.tree.leaves(where), strict=True
  ):
    size = leaf.dtype.itemsize / 1e6
    held += size * math.prod(at.shard_shape(leaf.shape))
    whole += size * math.prod(leaf.shape)
  return held, whole


def _misfits(layout: Layout, letters: Tree, tree: Tree) -> list:
  """(elements, 'path (v=259 by 8)') of what a rule names but cannot spread."""
  found = []
  for (path, leaf), own in zip(
    _paths(tree), jax.tree.leaves(letters), strict=True
  ):
    taken = sharding.spec(layout, own, leaf.shape)
    size = dict(zip(own, leaf.shape, strict=True))
    odd = [
      f'{letter}={size[letter]} by {layout.mesh.shape[axis]}'
      for letter, axis in layout.rules
      if letter in size and axis not in taken
      if size[letter] % layout.mesh.shape[axis]
    ]
    if odd:
      found.append(
        (math.prod(leaf.shape), f'{path} ({", ".join(dict.fromkeys(odd))})')
      )
  return found


def _paths(tree: Tree) -> list[tuple[str, Any]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(_text(path), leaf) for path, leaf in flat]


def _text(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
