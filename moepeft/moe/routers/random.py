# SPDX-License-Identifier: Apache-2.0
"""A baseline: a fixed random gate that is not trained."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moepeft.core.ranges import MAX_SEED, Range, option
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


class Random(nn.Module):
  """Routes each token to k experts by a fixed random projection.

  Equal activations always have the same experts, in training and after it, as
  in SMoE-Dropout (Chen et al., arXiv:2303.01610); hash layers (Roller et al.,
  arXiv:2106.04426) are similar. Each row sums to one. There are no parameters:
  the projection is a function of the site, the layer and `seed`.

  Attributes:
    experts: e.
    k: the number of experts per token.
    seed: the seed of the projection.
  """

  experts: int = option(1, EXPERTS)
  k: int = option(1, EXPERTS)
  seed: int = option(0, Range(0, MAX_SEED))

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    check_k('random', self.k, self.experts)
    shape = (x.shape[-1], self.experts)
    kernel = projection(self.path, self.seed, shape, ctx.layer)
    logits = mask_experts(gate_logits(x, kernel), ctx)
    weights = top_mask(logits, self.k).astype(jnp.float32) / self.k
    return Routing(logits, weights, k=self.k)


def projection(
  path: Sequence[str],
  seed: int,
  shape: tuple[int, ...],
  layer: Array | int | None = None,
) -> Array:
  """The kernel float32 [i, e] of the router at a module's path."""
  # The path has 'layers' or, without a scan, 'layers_3'.
  site = '/'.join(p for p in path if not p.startswith('layers'))
  rng = jax.random.fold_in(jax.random.key(seed), _hash(site))
  if layer is not None:
    rng = jax.random.fold_in(rng, layer)
  return jax.random.normal(rng, shape, jnp.float32)


def _hash(path: str) -> int:
  return zlib.crc32(path.encode()) & 0x7FFFFFFF


class FixedProjectionRouter(nn.Module):
  """`Random` with its projection as an array, for a pool of served adapters.

  The projection depends on the adapter's path, which a pool changes.

  Parameters: kernel [i, e].
  """

  experts: int = 1
  k: int = 1

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    shape = (x.shape[-1], self.experts)
    kernel = peft_param(self, 'kernel', Constant(0), shape, 'ie')
    logits = mask_experts(gate_logits(x, kernel), ctx)
    weights = top_mask(logits, self.k).astype(jnp.float32) / self.k
    return Routing(logits, weights, k=self.k)


def pooled_module(router: Random) -> FixedProjectionRouter:
  return FixedProjectionRouter(router.experts, router.k, parent=None)


def pooled_kernel(
  path: Sequence[str], options: Mapping[str, Any], shape: Sequence[int]
) -> np.ndarray:
  """The projections [(l,) i, e] of the router at a path, all layers."""
  seed = options.get('seed', Random.seed)
  layers = range(shape[0]) if len(shape) == 3 else [None]
  kernels = [
    np.asarray(projection(path, seed, shape[-2:], layer)) for layer in layers
  ]
  return np.stack(kernels).reshape(shape)


ROUTER = RouterSpec(
  Random,
  learned=False,
  pooled_module=pooled_module,
  pooled_kernel=pooled_kernel,
  pooled_options=('seed',),
)
