# SPDX-License-Identifier: Apache-2.0
"""Experts by the size of their own projection of the input: FlyLoRA."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS, check_k, mask_experts, top_mask
from moepeft.moe.router import RouterSpec
from moepeft.moe.router_state import against_load, router_state
from moepeft.moe.router_stats import RouterStats
from moepeft.nn.numerics import to_f32


class Magnitude(nn.Module):
  """weights = 1 for the k experts with the largest |z + d|, else 0.

  z is what the router reads, one number an expert: the experts' projections
  x A (reads='down'). There is no trained parameter; d is state, which moves by
  `rate` towards even loads after each optimizer step.

  Source: FlyLoRA (Zou et al., arXiv:2510.08396). The fork of peft in its
  repository moves d in every forward pass, evaluation too.

  State: bias [e].

  Attributes:
    experts: e; k: how many of them a token uses; rate: a step of d.
  """

  experts: int = option(1, EXPERTS)
  k: int = option(1, EXPERTS)
  rate: float = option(1e-3, Range(0, 1), training_only=True)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    check_k('magnitude', self.k, self.experts)
    if x.shape[-1] % self.experts:
      raise ValueError(
        f'magnitude reads one number of each of {self.experts} experts; got '
        f"{x.shape[-1]} features: write reads='down'"
      )
    bias = router_state(self, 'bias', (self.experts,), 'e')
    # Columns that pad a served adapter to a larger rank are zeros.
    z = jnp.sum(to_f32(x).reshape(*x.shape[:-1], self.experts, -1), axis=-1)
    logits = mask_experts(jnp.abs(z + bias), ctx)
    weights = top_mask(logits, self.k).astype(jnp.float32)
    return Routing(logits, weights, k=self.k)


def update(
  router: Magnitude, state: dict[str, Array], sums: RouterStats
) -> dict[str, Array]:
  """d + rate * sign(the mean load - the expert's load)."""
  return {'bias': against_load(state['bias'], router.rate, sums)}


ROUTER = RouterSpec(
  Magnitude, normalized=False, learned=False, per_expert=True, update=update
)
