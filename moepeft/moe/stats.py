# SPDX-License-Identifier: Apache-2.0
"""Sums of a site's routing over real tokens, and statistics made of them.

The sums add up over microbatches, devices, heads and layers; statistics and
`losses` are pure functions of them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moepeft.typing import Array, Context, Router, Routing, Tree


@struct.dataclass
class Sums:
  """Over the real tokens of one site; a layer axis may stand in front.

  Attributes:
    count: [] how many tokens (times heads where heads are routed).
    load: [e] tokens sent to each expert, a token's k experts 1/k each; a
      router that weights every expert counts as sending to its largest.
    probability: [e] sums of the softmax of the logits.
    entropy: [] sums of that softmax's entropy, in nats.
    log_z2: [] sums of the squared log-partition of the logits.
  """

  count: Array
  load: Array
  probability: Array
  entropy: Array
  log_z2: Array


def reduce(routing: Routing, mask: Array | None) -> Sums:
  """Routing [b, t, (heads,) e] and a mask [b, t] of real tokens -> Sums."""
  weights = jax.lax.stop_gradient(routing.weights)
  if mask is None:
    mask = jnp.ones(weights.shape[:2], bool)
  mask = mask.reshape(mask.shape + (1,) * (weights.ndim - 1 - mask.ndim))
  real = jnp.broadcast_to(mask, weights.shape[:-1]).astype(jnp.float32)
  kth = jax.lax.top_k(weights, routing.k)[0][..., -1:]
  # Equal weights share the load, so that a uniform router's is even; where
  # fewer than k are left, as under expert dropout, only they do.
  chosen = ((weights >= kth) & (weights > 0)).astype(jnp.float32)
  chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
  log_p = jax.nn.log_softmax(routing.logits, axis=-1)
  p = jnp.exp(log_p)
  log_z = jax.nn.logsumexp(routing.logits, axis=-1)
  every = tuple(range(real.ndim))
  return Sums(
    count=jnp.sum(real),
    load=jnp.sum(chosen * real[..., None], axis=every),
    probability=jnp.sum(p * real[..., None], axis=every),
    entropy=-jnp.sum(jnp.sum(p * log_p, axis=-1) * real),
    log_z2=jnp.sum(log_z**2 * real),
  )


def route(module: nn.Module, router: Router, x: Array, ctx: Context) -> Routing:
  """Calls the router (or takes ctx.routing) and reports its sums.

  The sums leave in the collection 'routing' and the full weights in
  'weights', each only where the caller of `apply` asks for it.
  """
  routing = ctx.routing if ctx.routing is not None else router(x, ctx)
  if module.is_mutable_collection('routing'):
    sums = reduce(routing, ctx.token_mask)
    module.sow(
      'routing',
      'sums',
      sums,
      init_fn=lambda: jax.tree.map(jnp.zeros_like, sums),
      reduce_fn=lambda a, b: jax.tree.map(jnp.add, a, b),
    )
  if not module.is_initializing():
    module.sow('weights', 'weights', routing.weights)
  return routing


def by_site(collection: Tree) -> dict[str, Sums]:
  """The 'routing' collection, or sums of several, as {path: Sums}."""
  found = {}

  def walk(tree, path):
    for key, value in tree.items():
      if isinstance(value, Sums):
        found['/'.join(path)] = value
      else:
        walk(value, (*path, key))

  walk(collection, ())
  return found


@struct.dataclass
class Statistics:
  """What a site's sums say; arrays may have a layer axis in front.

  Attributes:
    load: [e] share of the tokens sent to each expert; sums to one.
    entropy: [] mean entropy of the router, nats; ln e at most.
    variation: [] the load's standard deviation over its mean.
    top: [] the share of the fullest expert.
  """

  load: Array
  entropy: Array
  variation: Array
  top: Array


def statistics(sums: Sums) -> Statistics:
  """Pure; a site without a real token gives zeros."""
  count = jnp.maximum(sums.count, 1)
  load = sums.load / count[..., None]
  mean = jnp.maximum(jnp.mean(load, axis=-1), 1e-9)
  return Statistics(
    load=load,
    entropy=sums.entropy / count,
    variation=jnp.std(load, axis=-1) / mean,
    top=jnp.max(load, axis=-1),
  )
