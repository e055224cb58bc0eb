# SPDX-License-Identifier: Apache-2.0
"""A routed mixture of any adapter: mixture(expert=lora(rank=4), experts=10).

MoLoRA and MoV (Zadouri et al., arXiv:2309.05444) are presets of it; see
`moepeft.peft.methods.presets`.

An adapter can be an expert where its module has the method

    mix(module, f, x, ctx, mixing) -> y

which makes the stacked parameters [e, ...] in `module` and computes `f` at `x`
with experts that have the weights of `mixing`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from moepeft.core.ranges import Choices, IntegerList, Range, Texts, option
from moepeft.core.types import AXIS_NAMES, Array, Context, Router, Routing
from moepeft.moe import DEFAULT_ROUTER
from moepeft.moe.dispatch import Dispatch, dispatch
from moepeft.moe.gate import EXPERTS, example_ids
from moepeft.moe.router_stats import route
from moepeft.moe.routers.softmax import Softmax
from moepeft.nn.adapter_hook import BaseLayer, flatten_features
from moepeft.nn.initializers import METADATA, record_expert_counts
from moepeft.peft.method import Exclusion, Method

READS = ('input', 'output', 'heads', 'down', 'first_pass', 'embedding')
COMBINE = ('outputs', 'parameters')
DISPATCH = ('auto', 'dense', 'sparse')
# Counts of experts by quarters of a stack's layers. Source: MoLA (Gao et al.,
# arXiv:2402.08562).
COUNTS_BY_QUARTER = {
  'triangle': (8, 6, 4, 2),
  'inverted_triangle': (2, 4, 6, 8),
  'diamond': (2, 8, 8, 2),
  'hourglass': (8, 2, 2, 8),
}
# Options that say how many experts there are; a method string has one of them.
EXPERT_COUNTS = ('experts', 'experts_per_layer', 'from_adapters', 'ranks')
EXCLUSIONS = (
  Exclusion(
    ('shared_experts', 'identity_experts'),
    ('experts_per_layer', 'from_adapters'),
    '{first} needs layers with the same number of fresh experts; drop it, or '
    'write `experts` in place of {second}',
  ),
  Exclusion(
    ('share_router', 'share_routing'),
    ('reads',),
    'sites share a router where they read the same input, or take the routing '
    'of the first one, which reads its input; got reads={value}; write '
    "reads='input', or {first}=False",
  ),
  Exclusion(
    ('by_column',),
    ('combine',),
    "each column's experts are mixed by their outputs; write "
    "combine='outputs', or drop by_column",
  ),
  Exclusion(
    ('share',),
    ('from_adapters',),
    'adapters that were trained apart have no parameter in common; write '
    "share=''",
  ),
)


@dataclasses.dataclass(frozen=True)
class Mixing:
  """The experts' weights and the way in which a mixture combines them.

  Attributes:
    experts: e, the number of them in the stacked parameters.
    weights: () -> [b, t, e], or [b, t, n, e] for each head or split; where the
      mixture reads 'down', (the experts' down-projections of x) -> weights. To
      be called once.
    k: the number of experts with weight, the same for every token; None if it
      differs, or if the weights are not known yet.
    share: the parameters that all experts have in common, one letter each.
    combine, dispatch, by_column: as in `Mixture`; by column, the weights are
      [b, t, r, e].
    ranks: as in `Mixture`.
    splits: the number of equal parts of the inputs and of the outputs that have
      weights of their own; with more than one, parameters are combined and none
      is shared.
  """

  experts: int
  weights: Callable[..., Array]
  k: int | None = None
  share: str = ''
  combine: str = 'outputs'
  dispatch: str = 'dense'
  by_column: bool = False
  ranks: tuple[int, ...] = ()
  splits: int = 1

  def slots(self, pays: Callable[[int, int, int], bool]) -> Dispatch | None:
    """The tokens sorted by expert; None where all experts are computed.

    Args:
      pays: (tokens, e, k) -> whether sorting takes less time, for 'auto'.
    """
    if self.dispatch == 'dense':
      return None
    whole = not self.share and self.combine == 'outputs'
    weights = self.weights() if self.k and whole else None
    if weights is None or weights.ndim != 3:
      if self.dispatch == 'sparse':
        raise ValueError(
          "dispatch='sparse' needs a router that gives each token k experts, "
          "like topk, one routing for all heads, combine='outputs' and no "
          "option `share`; write dispatch='dense'"
        )
      return None
    weights = weights.reshape(-1, self.experts)
    if self.dispatch == 'auto' and not pays(*weights.shape, self.k):
      return None
    return dispatch(weights, self.k)


class Mixture(nn.Module):
  """Experts of one form, mixed for each token by a router.

  Parameters: the expert's with an axis of experts, and the router's.

  Attributes:
    expert: the adapter that each expert is, unbound; `kinds.Kinds` where they
      are of several kinds.
    experts: e, of all kinds, the largest where layers have unlike counts.
    experts_per_layer: the counts of a stack's layers, as in MoLA (Gao et al.,
      arXiv:2402.08562), or a name of COUNTS_BY_QUARTER; () where all have e.
      The arrays of all layers have e experts; those beyond a layer's own are
      zeros that get no weight.
    router: the router module.
    reads: what the router sees. 'input': x, at an attention's core the
      queries; 'output': f(x); 'heads': each
      head of f(x), through one router that the heads share, and 'output'
      where f(x) has no heads; 'down': the experts' down-projections of x,
      x A of low-rank ones; 'first_pass': the last hidden state of the token in
      a pass without adapters, as in X-LoRA (Buehler and Buehler,
      arXiv:2402.07148); 'embedding': a vector of the token's example that is
      given with the data, so that all its tokens have one routing.
    embedding_size: the number of values of that vector, 0 for other `reads`.
    share: the parameters that all experts have in common, '' for none.
    combine: 'outputs' weights what the experts compute; 'parameters' weights
      each of their parameters, and computes one expert of the sums, as in
      SMEAR (Muqeeth et al., arXiv:2306.03745).
    dispatch: 'dense' computes all experts for every token; 'sparse' sorts
      tokens by expert, and computes the experts that the router chose; 'auto'
      takes what is faster for the shapes; see `moepeft.moe.dispatch`.
    shared_experts: experts with a weight of one for every token, beside e.
    identity_experts: experts of the router that add nothing, beside e.
    share_router: whether the sites of a layer that read the same input (q, k
      and v; gate and up) have one router and one routing, those of the first of
      them; as in HMoRA (openreview lTkHiXeuDl). It needs reads='input'.
    share_routing: whether all sites of a layer have the router and the routing
      of the first of them, whatever they read; as in Hard-Routed MoR-LoRA
      (arXiv:2606.31413), where that of the feed-forward's input holds for its
      down-projection too. Keys and values of a cross-attention are of other
      tokens and have the routing of the first of these two. It needs
      reads='input'.
    ranks: the rank of each low-rank expert, whose scale is alpha over it. The
      arrays of all have the largest; the rest is never read. () where all have
      the same.
    by_column: whether each column of the rank has a router of its own, as in
      MoDE (Ning et al., arXiv:2408.01505): an expert's rank-one terms are
      weighted apart.
    from_adapters: paths of the trained adapters that the experts start as, one
      each; empty where they start as fresh ones. The experts then stay as they
      are, and only the router is trained.
    train_experts: whether experts from trained adapters are trained further.
  """

  expert: nn.Module
  experts: int = option(10, EXPERTS)
  experts_per_layer: tuple[int, ...] | str = option(
    (), IntegerList(EXPERTS, tuple(COUNTS_BY_QUARTER))
  )
  router: nn.Module = Softmax(10)
  reads: str = option('input', Choices(READS))
  embedding_size: int = option(0, Range(0, 65_536))
  share: str = ''
  combine: str = option('outputs', Choices(COMBINE))
  dispatch: str = option('auto', Choices(DISPATCH), training_only=True)
  shared_experts: int = option(0, Range(0, 65_536))
  identity_experts: int = option(0, Range(0, 65_536))
  share_router: bool = False
  share_routing: bool = False
  ranks: tuple[int, ...] = option((), IntegerList(EXPERTS))
  by_column: bool = False
  from_adapters: tuple[str, ...] = option((), Texts(), training_only=True)
  train_experts: bool = option(False, None, training_only=True)

  @property
  def frozen_arrays(self) -> tuple[str, ...]:
    """Regular expressions of arrays that stay as they are."""
    freezes_experts = self.from_adapters and not self.train_experts
    router_arrays = getattr(self.router, 'frozen_arrays', ())
    return (
      *(
        ('(?!router/)',)
        if freezes_experts
        else getattr(self.expert, 'frozen_arrays', ())
      ),
      *(f'router/{arrays}' for arrays in router_arrays),
    )

  @property
  def down_arrays(self) -> tuple[str, ...]:
    """Regular expressions of the experts' down-projections, [*in, e, r]."""
    names = getattr(self.expert, 'down_names', ())
    return tuple(f'{name}$' for name in names if name not in self.share)

  @property
  def unread_arrays(self) -> dict[str, float]:
    """{regular expression: the share of the array that is never read}."""
    if not self.ranks:
      return {}
    share = 1 - sum(self.ranks) / (len(self.ranks) * max(self.ranks))
    return {f'{name}$': share for name in 'ab' if name not in self.share}

  @property
  def tied_arrays(self) -> dict[str, int]:
    """{regular expression: groups} of arrays that layers have in common."""
    return getattr(self.expert, 'tied_arrays', {})

  @property
  def shares_routing(self) -> bool:
    """Whether a site may have the routing of an earlier one of its layer."""
    return self.share_router or self.share_routing

  @property
  def two_pass(self) -> bool:
    """Whether it needs `Context.first_pass`."""
    return self.reads == 'first_pass'

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    # At an attention's core x is `Heads`.
    router_input = ctx.first_pass if self.two_pass else getattr(x, 'q', x)
    if self.embedding_size:
      router_input = self._embeddings(router_input, ctx)
    if self.reads in ('output', 'heads'):
      router_input = y = f(x)
      f = dataclasses.replace(f, call=_at(f, x, y))
    if self.reads != 'heads' or router_input.ndim != 4:
      router_input = flatten_features(router_input)
    router_ctx = self._with_expert_mask(ctx)

    def weights_of_down(down: Array | None = None) -> Array:
      if down is None:
        raise ValueError(
          f"{self.name}: its experts have no down-projection for reads='down'; "
          "write reads='input'"
        )
      return self._weights(self._route(x, down, router_ctx))

    mixing = Mixing(
      self.experts + self.shared_experts,
      weights_of_down,
      share=self.share,
      combine=self.combine,
      dispatch=self.dispatch,
      by_column=self.by_column,
      ranks=self.ranks,
      splits=self._splits,
    )
    if self.reads != 'down':
      routing = self._route(x, router_input, router_ctx)
      weights = self._weights(routing)
      mixing = dataclasses.replace(
        mixing,
        weights=lambda down=None: weights,
        k=routing.k and min(routing.k + self.shared_experts, mixing.experts),
      )
    return self.expert.mix(self, f, x, ctx, mixing)

  def _embeddings(self, x: Array, ctx: Context) -> Array:
    """The embedding of each token's example, [b, t, i]."""
    embeddings, size = ctx.embeddings, self.embedding_size
    if embeddings is None and self.is_mutable_collection('peft'):
      # The batch that arrays are made with has no embeddings.
      embeddings = jnp.zeros((len(x), 1, size))
    if embeddings is None or embeddings.shape[-1] != size:
      actual = 'none' if embeddings is None else str(embeddings.shape[-1])
      raise ValueError(
        f'{self.name} routes by an embedding of each example, of {size} '
        f'numbers, and this batch has {actual}; train it and score rows that '
        "have 'embedding', or generate with another method, like "
        "reads='input'"
      )
    index = jnp.maximum(example_ids(x, ctx) - 1, 0)
    return jnp.take_along_axis(embeddings, index[..., None], axis=1)

  def _route(self, x: Array, features: Array, ctx: Context) -> Routing:
    """The routing of the features of x, from an earlier site if shared."""
    routings = ctx.layer_routings if self.shares_routing else None
    if routings is None:
      return route(self, self._router, features, ctx)
    key = None if self.share_routing else x
    # A wrapper of a pool has the name, and an expert's module shares its scope.
    name = self.scope.name
    routing = routings.get(name, key)
    if routing is None:
      routing = route(self, self._router, features, ctx)
      routings.put(name, key, routing)
    return routing

  @property
  def _router(self) -> Router:
    """The router; by column, r of it with results [b, t, r, e]."""
    if not self.by_column:
      return self.router
    lifted = nn.vmap(
      lambda router, x, ctx: router(x, ctx),
      in_axes=None,
      out_axes=2,
      axis_size=self.expert.rank,
      variable_axes={'peft': 0, METADATA: 0, 'cache': 0},
      split_rngs={'peft': True, METADATA: True, 'router': True},
      metadata_params={'peft': AXIS_NAMES['r']},
    )
    return lambda x, ctx: lifted(self.router, x, ctx)

  @property
  def _splits(self) -> int:
    splits = getattr(self.router, 'splits', 1)
    takes_splits = getattr(self.expert, 'takes_splits', False)
    is_combined = self.combine == 'parameters' and not self.share
    fits = takes_splits and is_combined and not self.experts_per_layer
    if splits > 1 and not fits:
      raise ValueError(
        f'{self.name}: a router with splits={splits} weights parts of the '
        "parameters of expert=lora; write combine='parameters' without share "
        'and experts_per_layer, or splits=1'
      )
    return splits

  def _weights(self, routing: Routing) -> Array:
    """The combine weights, without identity experts, with shared ones."""
    self._check_k(routing.k)
    weights = routing.combine_weights
    if self.identity_experts:
      weights = weights[..., : self.experts]
    if self.shared_experts:
      always_on = jnp.ones((*weights.shape[:-1], self.shared_experts))
      weights = jnp.concatenate([weights, always_on], axis=-1)
    return weights

  def _with_expert_mask(self, ctx: Context) -> Context:
    """The context with the mask of the experts that the layer has."""
    if not self.experts_per_layer:
      return ctx
    counts = layer_counts(self.experts_per_layer, ctx.layer_count)
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
    if k is None or not self.experts_per_layer:
      return
    least = min(_possible_counts(self.experts_per_layer))
    if k > least:
      raise ValueError(
        f'{self.name}: a router that chooses k={k} experts needs as many in '
        f'each layer; experts_per_layer has {least}'
      )


def layer_counts(counts: tuple[int, ...] | str, layers: int) -> tuple[int, ...]:
  """The number of experts in each of a stack's layers.

  Args:
    counts: the option `experts_per_layer`.
  """
  if not isinstance(counts, str):
    return counts
  quarters = COUNTS_BY_QUARTER[counts]
  return tuple(quarters[4 * i // layers] for i in range(layers))


def largest_count(counts: tuple[int, ...] | str) -> int:
  """The largest number of experts that a layer may have; 0 for ()."""
  return max(_possible_counts(counts), default=0)


def _possible_counts(counts: tuple[int, ...] | str) -> tuple[int, ...]:
  return COUNTS_BY_QUARTER[counts] if isinstance(counts, str) else counts


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
  router: str = DEFAULT_ROUTER,
) -> Method:
  """The entry of a mixture.

  Args:
    expert: the entry of the expert's method.
    values: {option of the mixture or the expert: default}.
    router: of a text that names none.
    roles, defaults: as in `Method`; None takes the expert's roles.
  """
  return Method(
    module=Mixture,
    roles=expert.roles if roles is None else roles,
    defaults=defaults or {},
    expert=expert,
    values=values or {},
    router=router,
    why_not='its experts are weighted anew for every token',
    initial_change=expert.initial_change,
    exclusions=(*EXCLUSIONS, *expert.exclusions),
    check=expert.check,
    size_option=expert.size_option,
    exact_identity=expert.additive,
    replaces=expert.replaces,
    scaled_leaves=expert.scaled_leaves,
    not_pooled=expert.not_pooled,
  )
