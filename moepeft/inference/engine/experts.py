# SPDX-License-Identifier: Apache-2.0
"""What the routers of a step did, from the collection 'weights'."""

import jax.numpy as jnp

from moepeft.core.types import Array, Tree


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
