# SPDX-License-Identifier: Apache-2.0
"""A stack of equal layers, scanned: the program does not grow with depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context, Tree
from moepeft.nn.initializers import METADATA

REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}

# Everything that a layer owns or reports has its layers on axis 0.
COLLECTIONS = ('params', 'peft', METADATA, 'routing', 'weights', 'cache')
AXES = dict.fromkeys(COLLECTIONS, 0)
RNGS = dict.fromkeys(('params', 'peft', METADATA, 'dropout', 'router'), True)


def scan_layers(
  block: nn.Module,
  length: int,
  x: Array,
  ctx: Context,
  *args,
  scan: bool = True,
  remat: str = 'none',
  unroll: int = 1,
) -> Array:
  """Calls `length` copies of a block one after the other.

  Must be called from a compact method; the layers' variables are found under
  'layers' (scanned) or 'layers_0', 'layers_1', ... (not). `ctx.run_layers`,
  where set, is called instead.

  Args:
    block: an unbound module, (x, ctx, *args) -> x; ctx.layer and
      ctx.layer_count are set for it.
    remat: 'none', 'dots' (matrix products are kept) or 'full'.
    unroll: layers written out in one step of the scan: faster on CPU, and the
      program grows with it; the variables are the same. One where there is
      remat, which needs the loop.

  Raises:
    ValueError: the remat policy does not exist, or ctx.routing is of another
      number of layers, rows or tokens.
  """
  ctx = ctx.replace(layer_count=length)
  if ctx.run_layers is not None:
    return ctx.run_layers(block, length, x, ctx.replace(run_layers=None), args)
  if remat not in REMAT:
    raise ValueError(f'remat is one of {", ".join(REMAT)}; got {remat!r}')
  if ctx.routing is not None:
    shape = ctx.routing.combine_weights.shape
    if shape[:-1] != (length, *x.shape[:2]):
      raise ValueError(
        'expected a routing of (layers, rows, tokens, experts) = '
        f'({length}, {x.shape[0]}, {x.shape[1]}, e); got {shape}'
      )
  if not scan:
    for i in range(length):
      # A copy each: a module that is used twice shares its variables.
      layer_block = block.clone(parent=None)
      layer = _remat(_Layer, remat)(layer_block, name=f'layers_{i}')
      x, _ = layer(x, jnp.int32(i), ctx, args)
    return x
  layers = nn.scan(
    _remat(_Layer, remat, scanned=True),
    variable_axes=AXES,
    split_rngs=RNGS,
    in_axes=(0, nn.broadcast, nn.broadcast),
    length=length,
    # Written out, XLA would merge layers with their recomputation, on CPU in
    # spite of barriers: remat would save nothing.
    unroll=min(unroll, length) if remat == 'none' else 1,
    # No variable is broadcast: without the check a layer is traced once, not
    # twice, and tracing is most of a short run's start.
    check_constancy_invariants=False,
    metadata_params={'params': 'layers', 'peft': 'layers'},
  )(block, name='layers')
  return layers(x, jnp.arange(length, dtype=jnp.int32), ctx, args)[0]


def unstack_layers(tree: Tree) -> Tree:
  """Variables of scanned layers as those of layers that are not scanned.

  'layers' -> 'layers_0', 'layers_1', ...: each layer's arrays are its own, so
  that a program need not cut them out again and again.
  """
  unstacked = {}
  for key, value in tree.items():
    leaves = jax.tree.leaves(value)
    if key == 'layers' and leaves:
      for i in range(len(leaves[0])):
        unstacked[f'layers_{i}'] = jax.tree.map(lambda a, i=i: a[i], value)
    else:
      unstacked[key] = (
        unstack_layers(value) if isinstance(value, dict) else value
      )
  return unstacked


def _remat(layer, remat: str, scanned: bool = False):
  if remat == 'none':
    return layer
  return nn.remat(layer, policy=REMAT[remat], prevent_cse=not scanned)


class _Layer(nn.Module):
  """A block whose variables lie at this module's own path."""

  block: nn.Module

  @nn.compact
  def __call__(self, x, number, ctx, args):
    nn.share_scope(self, self.block)
    return self.block(x, ctx.replace(layer=number), *args), None
