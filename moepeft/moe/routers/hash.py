# SPDX-License-Identifier: Apache-2.0
"""A baseline: experts that are fixed by the token's id, as in hash layers."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import MAX_SEED, Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS, check_k, mask_experts, top_mask
from moepeft.moe.router import RouterSpec


class Hash(nn.Module):
  """weights = 1 / k for k experts that a hash of the token's id picks.

  Source: Roller et al., arXiv:2106.04426, the random hash. The sites of a layer
  have the same hash, and layers have different ones. There are no parameters.

  Attributes:
    experts: e.
    k: the number of experts per token.
    seed: the seed of the hash.
  """

  experts: int = option(1, EXPERTS)
  k: int = option(1, EXPERTS)
  seed: int = option(0, Range(0, MAX_SEED))

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    check_k('hash', self.k, self.experts)
    if ctx.token_ids is None:
      raise ValueError(
        'the router hash reads the ids of the tokens, which this site does not '
        'have; name sites of layers with `targets`, or use another router'
      )
    key = _mix(jnp.uint32(self.seed))
    if ctx.layer is not None:
      key = _mix(key + ctx.layer.astype(jnp.uint32) + 1)
    ids = _mix(key ^ ctx.token_ids.astype(jnp.uint32))
    experts = jnp.arange(self.experts, dtype=jnp.uint32)
    draws = _mix(ids[..., None] + experts * jnp.uint32(0x9E3779B9))
    # The 24 bits that float32 holds, as a number below one.
    scores = (draws >> 8).astype(jnp.float32) * 2.0**-24
    shape = (*ids.shape, *(1,) * (x.ndim - 3), self.experts)
    scores = jnp.broadcast_to(
      scores.reshape(shape), (*x.shape[:-1], self.experts)
    )
    logits = mask_experts(scores, ctx)
    weights = top_mask(logits, self.k).astype(jnp.float32) / self.k
    return Routing(logits, weights, k=self.k)


def _mix(x: Array) -> Array:
  """The finalizer of MurmurHash3, a bijection of uint32."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


ROUTER = RouterSpec(Hash, learned=False, reads_token_ids=True)
