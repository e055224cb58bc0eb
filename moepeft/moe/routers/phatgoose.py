# SPDX-License-Identifier: Apache-2.0
"""Routing over trained adapters by the gate that each was given: PHATGOOSE."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from moepeft.core.ranges import option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import (
  EXPERTS,
  check_k,
  gate_logits,
  mask_experts,
  top_mask,
)
from moepeft.moe.router import RouterSpec
from moepeft.nn.initializers import Constant, peft_param
from moepeft.nn.norms import layer_norm
from moepeft.nn.numerics import softmax

# That of torch.nn.LayerNorm.
EPSILON = 1e-5


class Phatgoose(nn.Module):
  """weights = softmax(LN(x) . LN(v_e) / sqrt(i)) over the k largest.

  v_e is the gate of adapter e: with the adapter frozen, sigmoid(x . v_e) times
  its term was trained on the adapter's data. No parameter is trained here, and
  LN has no scale and no bias. Source: Muqeeth et al., arXiv:2402.05859, and
  its released code, r-three/phatgoose.

  Parameters: kernel [i, e], the gates, not trained.

  Attributes:
    experts: e; k: how many of them a token uses.
  """

  experts: int = option(1, EXPERTS)
  k: int = option(2, EXPERTS)

  @property
  def frozen_arrays(self) -> tuple[str, ...]:
    return ('kernel$',)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    check_k('phatgoose', self.k, self.experts)
    size = x.shape[-1]
    kernel = peft_param(self, 'kernel', Constant(0), (size, self.experts), 'ie')
    logits = gate_logits(_normalize(x), _normalize(kernel.T).T) / size**0.5
    logits = mask_experts(logits, ctx)
    chosen = jnp.where(top_mask(logits, self.k), logits, -jnp.inf)
    return Routing(logits, softmax(chosen), k=self.k)


def _normalize(x: Array) -> Array:
  return layer_norm(x, jnp.float32(1), jnp.float32(0), EPSILON)


def kernel_of(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The kernel of the router at one site and layer.

  Args:
    arrays: of gated experts, gate [e, i].
  """
  return {'kernel': arrays['gate'].T}


ROUTER = RouterSpec(
  Phatgoose, learned=False, from_experts=kernel_of, reads_gates=True
)
