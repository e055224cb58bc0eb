# SPDX-License-Identifier: Apache-2.0
"""Adapter trees of a bucket, stacked on a slot axis z.

Memory traffic, for b rows and S bytes a slot: the gather reads and writes b S
bytes, and the matrix products read b S again. The base weights are read once
for all rows. With SmolLM2-135M (538 MB in float32) and LoRA of rank 16 on all
projections, S is 30 layers x 10,176 features in and out x 16 x 4 bytes = 20 MB.
A layer's gathered arrays (`moepeft.inference.engine.per_layer`) are 5 MB for
eight rows and stay in the CPU cache, so of the 470 MB that eight rows add, 156
MB come from memory.
"""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Tree


def row_tree(tree: Tree, slots: Array, layer: Array | None = None) -> Tree:
  """Selects the 'peft' tree of one row, for `AdapterPool.adapter_map`.

  Under `vmap` over `slots` it is a batched gather.

  Args:
    tree: `AdapterPool.tree`, {bucket: 'peft' tree with leaves [z, ...]}.
    slots: int32 [buckets], the slot in each bucket, sorted by bucket name.
    layer: int32 scalar, to select one layer of leaves [z, l, ...].
  """
  merged = {}
  for slot, name in zip(slots, sorted(tree), strict=True):
    index = slot if layer is None else (slot, layer)
    row = jax.tree.map(lambda a, index=index: a[index], tree[name])
    merged = _merge(merged, row)
  return merged


def _merge(a: Tree, b: Tree) -> Tree:
  """Merges two trees, which have no path in common."""
  merged = dict(a)
  for key, value in b.items():
    merged[key] = _merge(merged[key], value) if key in merged else value
  return merged


def stack_copies(tree: Tree, slots: int) -> Tree:
  """Stacks copies of a tree, one for each slot."""
  return jax.tree.map(lambda a: jnp.broadcast_to(a, (slots, *a.shape)), tree)


@jax.jit
def write_slot(stack: Tree, slot: Array, tree: Tree) -> Tree:
  """Returns a copy of a bucket's arrays with `tree` written to a slot.

  It is a copy because a running step still reads the old arrays.
  """
  return jax.tree.map(lambda a, new: a.at[slot].set(new), stack, tree)
