# SPDX-License-Identifier: Apache-2.0
"""An entry of ROUTERS: a router's module and the facts about it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RouterLoss:
  """An auxiliary loss of a router.

  Attributes:
    function: RouterStats of a site -> scalar, the mean over layers. The sums
      are of the whole batch, whatever is accumulated or sharded.
    reads: names in `RouterStats.aux`; sites without them are left out.
  """

  function: Callable
  reads: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RouterSpec:
  """An entry of ROUTERS.

  Tests check each fact that is true, and show a counterexample of each that is
  false.

  Attributes:
    module: the Flax module `(x, ctx) -> Routing`; its fields are the options,
      one of which is `experts`.
    normalized: whether a token's combine weights sum to one, with the default
      options.
    covers_tokens: whether every token has an expert, with the default options.
    causal: whether a token's routing depends on no later token of its row,
      outside of the prompt. In a decoder a router has to be.
    pools_prompt: whether it reads the whole prompt (`Context.prompt_mask`) at
      each token, as routers of sentences do. The engine's caches do not hold
      what it needs, so such a router is trained and scored, not generated with.
    independent_of_batch: whether a token's routing depends on no other row.
    learned: whether the router has trained parameters.
    per_expert: whether it reads as many features of each expert, which the
      experts compute (reads='down').
    from_experts: of a router over trained adapters, ({name: array [e, ...]} of
      a site's experts in one layer) -> {name: array} of the router's own.
    losses: {name in config.router_losses: loss}, beside those of
      `moepeft.moe.aux_losses`, which every router has.
    statistics: {name in the metrics log: function of the same form}, logged for
      each site that reports what it reads; of a layer axis it keeps it.
    update: of a router with state (`moe.router_state`), (router, {name: array},
      RouterStats of the whole batch) -> {name: array}, of one site and layer,
      called once per optimizer step. None for a router without state.
    defaults: {semantics: options that the semantics decides}.
    pooled_module: for a router whose function depends on its path in the tree,
      which a pool of served adapters changes: router -> a router with the
      same function of the array 'kernel' alone. None for all others.
    pooled_kernel: (path, options, shape) -> that array.
    pooled_options: options that only `pooled_kernel` reads.
  """

  module: Any
  normalized: bool = True
  covers_tokens: bool = True
  causal: bool = True
  pools_prompt: bool = False
  independent_of_batch: bool = True
  learned: bool = True
  per_expert: bool = False
  from_experts: Callable | None = None
  losses: Mapping[str, RouterLoss] = dataclasses.field(default_factory=dict)
  statistics: Mapping[str, RouterLoss] = dataclasses.field(default_factory=dict)
  update: Callable | None = None
  defaults: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  pooled_module: Callable | None = None
  pooled_kernel: Callable | None = None
  pooled_options: tuple[str, ...] = ()
