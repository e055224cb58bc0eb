# SPDX-License-Identifier: Apache-2.0
"""Routing over trained adapters by the directions that they change: Arrow."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import (
  EXPERTS,
  TEMPERATURE,
  check_k,
  gate_logits,
  mask_experts,
  top_mask,
)
from moepeft.moe.router import RouterSpec
from moepeft.nn.initializers import Constant, peft_param
from moepeft.nn.numerics import softmax


class Arrow(nn.Module):
  """weights = softmax(|x . v_e| / temperature) over the k largest.

  v_e is the unit vector that expert e's term x A_e B_e makes longest: the top
  right singular vector of B_e A_e as the paper writes matrices. It is computed
  from the adapters in `from_adapters`, and nothing is trained. The sign of a
  singular vector means nothing, hence the absolute value.

  Source: Ostapenko et al., arXiv:2405.11157. The defaults are those of peft,
  which has no division by |x| either, though it calls the product a cosine.

  Parameters: kernel [i, e], the prototypes, not trained.

  Attributes:
    experts: e; k: how many of them a token uses; temperature: of the softmax.
  """

  experts: int = option(1, EXPERTS)
  k: int = option(1, EXPERTS)
  temperature: float = option(1.0, TEMPERATURE)

  @property
  def frozen_arrays(self) -> tuple[str, ...]:
    return ('kernel$',)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    check_k('arrow', self.k, self.experts)
    shape = (x.shape[-1], self.experts)
    kernel = peft_param(self, 'kernel', Constant(0), shape, 'ie')
    logits = mask_experts(
      jnp.abs(gate_logits(x, kernel)) / self.temperature, ctx
    )
    chosen = jnp.where(top_mask(logits, self.k), logits, -jnp.inf)
    return Routing(logits, softmax(chosen), k=self.k)


def prototypes(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The kernel of the router at one site and layer.

  Args:
    arrays: of low-rank experts, a [e, *in, r] and b [e, r, *out].
  """
  count, rank = len(arrays['a']), arrays['a'].shape[-1]
  a = arrays['a'].reshape(count, -1, rank).astype(np.float64)
  b = arrays['b'].reshape(count, rank, -1).astype(np.float64)
  # The singular vectors of A B are Q u, with those u of R B for A = Q R.
  q, r = np.linalg.qr(a)
  u, _, _ = np.linalg.svd(r @ b, full_matrices=False)
  top = (q @ u)[:, :, 0]
  return {'kernel': top.T.astype(np.float32)}


ROUTER = RouterSpec(Arrow, learned=False, from_experts=prototypes)
