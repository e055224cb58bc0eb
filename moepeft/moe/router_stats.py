# SPDX-License-Identifier: Apache-2.0
"""Sums of a site's routing over real tokens, and statistics of the sums.

The sums can be added over microbatches, devices, heads and layers. Statistics
and losses are pure functions of the sums.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.scipy.special import entr

from moepeft.core.types import Array, Context, Router, Routing, Tree
from moepeft.moe.gate import normalize
from moepeft.nn.numerics import to_f32


@struct.dataclass
class RouterStats:
  """Sums over the real tokens of one site; the first axis may be layers.

  Attributes:
    count: [] the number of tokens (times heads if each head is routed).
    share: [e] for a sparse router, the number of tokens of each expert, with
      the sum k * `count`; for a dense one, the sums of the normalized combine
      weights, with the sum `count`.
    weight_entropy: [] the sum of the entropy of a token's normalized combine
      weights in nats: 0 if one expert has all weight, ln e if all are equal.
    load: [e] for the load-balance loss: each of a token's k experts counts
      1/k; for a dense router, the expert with the largest weight counts 1.
    probability: [e] sums of the softmax of the logits.
    entropy: [] sums of that softmax's entropy, in nats.
    log_z2: [] sums of the squared log-partition of the logits.
    importance: [e] sums of the combine weights, with their gradient.
    aux: {name: [*any]} sums of `Routing.aux`.
    available: [e] the number of tokens in layers with the expert, `count` or
      0; None if every layer has all experts.
    sparse: whether the router is sparse, `Routing.sparse`; static.

  Sums that losses alone read are None in `without_loss_sums`.
  """

  count: Array
  share: Array
  weight_entropy: Array
  load: Array | None
  probability: Array | None
  entropy: Array
  log_z2: Array | None
  importance: Array | None
  aux: dict[str, Array] = struct.field(default_factory=dict)
  available: Array | None = None
  sparse: bool = struct.field(pytree_node=False, default=False)

  @property
  def experts(self) -> int | Array:
    """The number of experts: an int, or float [(l)] by layer."""
    if self.available is None:
      return self.share.shape[-1]
    return jnp.maximum(jnp.sum(self.available > 0, axis=-1), 1).astype(
      jnp.float32
    )


def router_stats(
  routing: Routing, mask: Array | None, expert_mask: Array | None = None
) -> RouterStats:
  """The sums of a Routing [b, t, (heads,) e].

  Args:
    mask: bool [b, t] of real tokens.
    expert_mask: bool [e], as in `Context`.
  """
  weights = jax.lax.stop_gradient(routing.combine_weights)
  if mask is None:
    mask = jnp.ones(weights.shape[:2], bool)
  mask = mask.reshape(mask.shape + (1,) * (weights.ndim - 1 - mask.ndim))
  real = jnp.broadcast_to(mask, weights.shape[:-1]).astype(jnp.float32)
  k = weights.shape[-1] if routing.selects else routing.k or 1
  # Expert dropout may leave fewer than k experts.
  load = weights > 0
  if k < weights.shape[-1]:
    # Experts with equal weights share the load, so that a uniform router has an
    # even load. Without this comparison if it is always true: XLA may compute
    # its sides apart, and their last digits then differ.
    load &= weights >= jax.lax.top_k(weights, k)[0][..., -1:]
  load = normalize(load.astype(jnp.float32))
  normalized = normalize(weights)
  share = (weights > 0).astype(jnp.float32) if routing.sparse else normalized
  log_p = jax.nn.log_softmax(routing.logits, axis=-1)
  p = jnp.exp(log_p)
  # For an expert with p = 0, p log p is 0, without a NaN in the gradient.
  finite_log_p = (
    log_p if expert_mask is None else jnp.where(expert_mask, log_p, 0)
  )
  log_z = jax.nn.logsumexp(routing.logits, axis=-1)
  token_axes = tuple(range(real.ndim))
  return RouterStats(
    count=jnp.sum(real),
    share=jnp.sum(share * real[..., None], axis=token_axes),
    weight_entropy=jnp.sum(jnp.sum(entr(normalized), axis=-1) * real),
    load=jnp.sum(load * real[..., None], axis=token_axes),
    probability=jnp.sum(p * real[..., None], axis=token_axes),
    entropy=-jnp.sum(jnp.sum(p * finite_log_p, axis=-1) * real),
    log_z2=jnp.sum(log_z**2 * real),
    importance=jnp.sum(
      routing.combine_weights * real[..., None], axis=token_axes
    ),
    aux={
      name: jnp.tensordot(real, to_f32(values), axes=real.ndim)
      for name, values in routing.aux.items()
    },
    available=None if expert_mask is None else jnp.sum(real) * expert_mask,
    sparse=routing.sparse,
  )


def route(module: nn.Module, router: Router, x: Array, ctx: Context) -> Routing:
  """Calls the router, or takes ctx.routing's layer, and sows its sums.

  The sums are in the collection 'routing' and the combine weights in 'weights',
  if these are mutable in `apply`.
  """
  if ctx.routing is not None and ctx.layer is not None:
    routing = jax.tree.map(lambda a: a[ctx.layer], ctx.routing)
  else:
    routing = router(x, ctx)
  if module.is_mutable_collection('routing'):
    sums = router_stats(routing, ctx.token_mask, ctx.expert_mask)
    module.sow(
      'routing',
      'sums',
      sums,
      init_fn=lambda: jax.tree.map(jnp.zeros_like, sums),
      reduce_fn=lambda a, b: jax.tree.map(jnp.add, a, b),
    )
  if not module.is_initializing():
    module.sow('weights', 'weights', routing.combine_weights)
  return routing


def collect(collection: Tree) -> dict[str, RouterStats]:
  """Converts the collection 'routing', or a sum of several, to {path: sums}."""
  stats_by_site = {}

  def walk(tree, path):
    for key, value in tree.items():
      if isinstance(value, RouterStats):
        stats_by_site['/'.join(path)] = value
      else:
        walk(value, (*path, key))

  walk(collection, ())
  return stats_by_site


def without_loss_sums(collection: Tree) -> Tree:
  """The collection 'routing' without the sums that losses alone read.

  A step that returns the rest does not compute them, unless a loss does.
  """
  unread = dict.fromkeys(('load', 'probability', 'log_z2', 'importance'))
  return jax.tree.map(
    lambda sums: sums.replace(**unread),
    collection,
    is_leaf=lambda x: isinstance(x, RouterStats),
  )


@struct.dataclass
class Statistics:
  """Means over a site's tokens; the first axis may be layers.

  Attributes:
    share: [e] for a sparse router, the fraction of tokens of each expert, with
      the sum k; for a dense one, the mean combine weight, with the sum 1.
    weight_entropy: [] mean entropy of a token's combine weights, nats.
    entropy: [] mean entropy of the softmax of the logits, before any
      selection, nats; at most ln e.
    variation: [] the coefficient of variation of the shares, over the experts
      of the layer.
    top: [] the largest share.
    experts: [] e, if it differs by layer; else None.
    sparse: whether the router is sparse; static.
  """

  share: Array
  weight_entropy: Array
  entropy: Array
  variation: Array
  top: Array
  experts: Array | None = None
  sparse: bool = struct.field(pytree_node=False, default=False)


def statistics(sums: RouterStats) -> Statistics:
  """The means of the sums, on the host; zeros for a site without a token."""
  # With NumPy: each operation of JAX would be compiled and dispatched alone.
  sums = jax.device_get(sums)
  count = np.maximum(sums.count, 1)
  share = sums.share / count[..., None]
  available = None if sums.available is None else sums.available > 0
  mean = np.maximum(over_experts(np.mean, share, available), 1e-9)
  return Statistics(
    share=share,
    weight_entropy=sums.weight_entropy / count,
    entropy=sums.entropy / count,
    variation=over_experts(np.std, share, available) / mean,
    top=np.max(share, axis=-1),
    experts=None if available is None else sums.experts,
    sparse=sums.sparse,
  )


def over_experts(
  reduce: Callable, share: Array, available: Array | None
) -> Array:
  """A mean or standard deviation of shares [..., e] over a layer's experts."""
  if available is None:
    return reduce(share, axis=-1)
  # Without a real token, no expert is available, and all shares are zero.
  where = available | ~available.any(axis=-1, keepdims=True)
  return reduce(share, axis=-1, where=where)
