# SPDX-License-Identifier: Apache-2.0
"""Scans a stack of equal layers, so that programs do not grow with depth."""

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

# In all collections, the layers are on axis 0.
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

  Call it from a compact method. The layers' variables are under 'layers'
  (scanned) or 'layers_0', 'layers_1', ... (not scanned). `ctx.run_layers`, if
  set, replaces this function.

  Args:
    block: an unbound module, (x, ctx, *args) -> x, called with ctx.layer and
      ctx.layer_count.
    remat: 'none', 'dots' (saves matrix products) or 'full'.
    unroll: layers in one step of the scan. More are faster on CPU, and the
      program is larger; the variables are the same. Remat needs 1.

  Raises:
    ValueError: the remat policy does not exist, or ctx.routing has another
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
      # A copy each, because a module that is used twice shares its variables.
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
    # In an unrolled scan, XLA merges layers with their recomputation (on CPU in
    # spite of barriers), and remat saves nothing.
    unroll=min(unroll, length) if remat == 'none' else 1,
    # No variable is broadcast. Without the check, a layer is traced once, not
    # twice, and tracing takes most of the start of a short run.
    check_constancy_invariants=False,
    metadata_params={'params': 'layers', 'peft': 'layers'},
  )(block, name='layers')
  return layers(x, jnp.arange(length, dtype=jnp.int32), ctx, args)[0]


def unstack_layers(tree: Tree) -> Tree:
  """Converts variables of scanned layers to those of layers without a scan.

  'layers' -> 'layers_0', 'layers_1', ..., so that a program does not slice the
  stacked arrays at every step.
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
  """A block whose variables are at this module's path."""

  block: nn.Module

  @nn.compact
  def __call__(self, x, index, ctx, args):
    nn.share_scope(self, self.block)
    return self.block(x, ctx.at_layer(index), *args), None
