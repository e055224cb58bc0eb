# SPDX-License-Identifier: Apache-2.0
"""Trees of one bucket, stacked on an axis z: a row reads a slot of each.

Bytes, for b rows and buckets of S bytes a slot: a gather reads b S and writes b
S, and the products read b S once more, against the base's weights, which are
read once for all rows. With SmolLM2-135M (538 MB in float32) and LoRA of rank
16 at all projections, S is 30 layers x 10,176 features in and out x 16 x 4
bytes = 20 MB. Layers come one by one (`moepeft.inference.engine.per_layer`),
and what is gathered of one for eight rows is 5 MB, which the products find in
the cache: of the 470 MB that eight rows add, 156 come from memory.
"""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Tree


def row_tree(tree: Tree, slots: Array, layer: Array | None = None) -> Tree:
  """The 'peft' tree of one row, for a model with `Banks.adapter_map`.

  Pure: under `vmap` over `slots`, a batched gather.

  Args:
    tree: `Banks.tree`, {bucket: 'peft' tree with z in front of every leaf}.
    slots: int32 [buckets], a slot of each bucket in the order of their names.
    layer: int32 scalar, where leaves are those of all layers, [z, l, ...], and
      one layer's are wanted.
  """
  merged = {}
  for slot, name in zip(slots, sorted(tree), strict=True):
    place = slot if layer is None else (slot, layer)
    row = jax.tree.map(lambda a, place=place: a[place], tree[name])
    merged = _merged(merged, row)
  return merged


def _merged(a: Tree, b: Tree) -> Tree:
  """Both trees; no path is in both, as buckets have entries of their own."""
  merged = dict(a)
  for key, value in b.items():
    merged[key] = _merged(merged[key], value) if key in merged else value
  return merged


def stack_copies(tree: Tree, slots: int) -> Tree:
  """The arrays of a bucket with one tree in every slot."""
  return jax.tree.map(lambda a: jnp.broadcast_to(a, (slots, *a.shape)), tree)


@jax.jit
def write_slot(bank: Tree, slot: Array, tree: Tree) -> Tree:
  """The arrays of a bucket with a slot filled.

  A copy: a step that is under way still reads the old ones. While it lasts,
  they are there twice.
  """
  return jax.tree.map(lambda a, new: a.at[slot].set(new), bank, tree)
