# SPDX-License-Identifier: Apache-2.0
"""A routed mixture of any adapter: mixture(expert=lora(rank=4), experts=10).

MoLoRA and MoV (Zadouri et al., arXiv:2309.05444) are presets of it; see
`moepeft.peft.methods.presets`.

An adapter can be an expert where its module has the method

    mix(module, f, x, weights, ctx, share) -> y

which makes the stacked parameters [e, ...] in `module` and computes `f` at `x`
with experts that have the weights [b, t, e], or [b, t, n, e] for each head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from moepeft.core.ranges import Choices, IntegerList, Texts, option
from moepeft.core.types import Array, Context
from moepeft.moe.gate import EXPERTS
from moepeft.moe.router_stats import route
from moepeft.moe.routers.softmax import Softmax
from moepeft.nn.adapter_hook import BaseLayer, flatten_features
from moepeft.nn.initializers import record_expert_counts
from moepeft.peft.method import Method

READS = ('input', 'output', 'heads')
# Options that say how many experts there are; a method string has one of them.
EXPERT_COUNTS = ('experts', 'experts_per_layer', 'from_adapters')


class Mixture(nn.Module):
  """Experts of one form, mixed for each token by a router.

  Parameters: the expert's with an axis of experts, and the router's.

  Attributes:
    expert: the adapter that each expert is, unbound.
    experts: e, the largest where layers have unlike counts.
    experts_per_layer: the counts of a stack's layers, as in MoLA (Gao et al.,
      arXiv:2402.08562); () where all have e. The arrays of all layers have e
      experts; those beyond a layer's own are zeros that get no weight.
    router: the router module.
    reads: what the router sees. 'input': x; 'output': f(x); 'heads': each
      head of f(x), through one router that the heads share, and 'output'
      where f(x) has no heads.
    share: the parameter that all experts have in common, '' for none.
    from_adapters: paths of the trained adapters that the experts start as, one
      each; empty where they start as fresh ones. The experts then stay as they
      are, and only the router is trained.
    train_experts: whether experts from trained adapters are trained further.
  """

  expert: nn.Module
  experts: int = option(10, EXPERTS)
  experts_per_layer: tuple[int, ...] = option((), IntegerList(EXPERTS))
  router: nn.Module = Softmax(10)
  reads: str = option('input', Choices(READS))
  share: str = ''
  from_adapters: tuple[str, ...] = option((), Texts(), training_only=True)
  train_experts: bool = option(False, None, training_only=True)

  @property
  def freezes_experts(self) -> bool:
    return bool(self.from_adapters) and not self.train_experts

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    router_input = x
    if self.reads != 'input':
      router_input = y = f(x)
      f = dataclasses.replace(f, call=_at(f, x, y))
    if self.reads != 'heads' or router_input.ndim != 4:
      router_input = flatten_features(router_input)
    router_ctx = self._with_expert_mask(ctx)
    routing = route(self, self.router, router_input, router_ctx)
    self._check_k(routing.k)
    weights = routing.combine_weights
    return self.expert.mix(self, f, x, weights, ctx, self.share)

  def _with_expert_mask(self, ctx: Context) -> Context:
    """The context with the mask of the experts that the layer has."""
    counts = self.experts_per_layer
    if not counts:
      return ctx
    if ctx.layer_count != len(counts):
      raise ValueError(
        f'{self.name} has experts_per_layer for {len(counts)} layers, and '
        f'{"/".join(self.path[:-1])} is in a stack of {ctx.layer_count}; give '
        'a count for each layer, and stacks of unlike depth a mixture each by '
        "`targets`, like targets='encoder/*'"
      )
    record_expert_counts(self, counts)
    masks = np.arange(self.experts) < np.array(counts)[:, None]
    return ctx.replace(expert_mask=jnp.asarray(masks)[ctx.layer])

  def _check_k(self, k: int | None) -> None:
    counts = self.experts_per_layer
    if counts and k is not None and k > min(counts):
      raise ValueError(
        f'{self.name}: a router that chooses k={k} experts needs as many in '
        f'each layer; experts_per_layer has {min(counts)}'
      )


def _at(f: BaseLayer, x: Array, y: Array):
  """The function f, whose value at x is y already."""
  return lambda z: y if z is x else f(z)


def can_be_expert(method: Method) -> bool:
  """Whether `mixture(expert=...)` takes a method."""
  return getattr(method.module, 'mix', None) is not None


def mixture_of(
  expert: Method,
  values: Mapping[str, Any] | None = None,
  roles: Mapping[str, tuple[str, ...]] | None = None,
  defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Method:
  """The entry of a mixture.

  Args:
    expert: the entry of the expert's method.
    values: {option of the mixture or the expert: default}.
    roles, defaults: as in `Method`; None takes the expert's roles.
  """
  return Method(
    module=Mixture,
    roles=expert.roles if roles is None else roles,
    defaults=defaults or {},
    expert=expert,
    values=values or {},
    why_not='its experts are weighted anew for every token',
    size_option=expert.size_option,
    exact_identity=expert.additive,
    not_pooled=expert.not_pooled,
  )
