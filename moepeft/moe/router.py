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
      are over the whole batch, also with accumulation and sharding.
    reads: names in `RouterStats.aux`; sites without them are skipped.
  """

  function: Callable
  reads: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RouterSpec:
  """An entry of ROUTERS.

  Tests check each fact that is true, and have a counterexample for each that is
  false.

  Attributes:
    module: the Flax module `(x, ctx) -> Routing`; its fields are the options,
      including `experts`.
    normalized: whether a token's combine weights sum to one, with the default
      options.
    covers_tokens: whether every token has an expert, with the default options.
    causal: whether a token's routing depends on no later token of its row,
      outside of the prompt. A decoder needs a causal router.
    pools_prompt: whether the router reads the whole prompt
      (`Context.prompt_mask`) at each token, as sentence-level routers do. In
      generation it has what it reads in the collection 'cache', and prompts
      are computed in one chunk, without the prefix cache.
    independent_of_batch: whether a token's routing depends on no other row.
    learned: whether the router has trained parameters.
    needs_tasks: whether the router needs the option `tasks`, as its weights
      are those of tasks.
    reads_token_ids: whether the router reads `Context.token_ids`, which a head
      does not have.
    per_expert: whether the router reads a projection of each expert
      (reads='down'), an equal number of features for each.
    from_experts: for a router over trained adapters, ({name: array [e, ...]} of
      the experts of one site and layer) -> {name: array} of the router.
    reads_gates: whether these arrays include 'gate' [e, i]. Each adapter then
      is a mixture of one expert, and its gate the kernel of that router.
    losses: {name in config.router_losses: loss}, in addition to those of
      `moepeft.moe.aux_losses`, which every router has.
    statistics: {name in the metrics log: RouterLoss}, logged for each site
      with the sums that the function reads; it keeps a layer axis.
    update: for a router with state (`moe.router_state`), (router, {name:
      array}, RouterStats of the whole batch) -> {name: array}, for one site and
      layer, called once per optimizer step. None for a router without state.
    defaults: {semantics: options with the defaults of the semantics}.
    pooled_module: for a router whose function depends on its path in the tree,
      which a pool of served adapters changes: router -> an equal router that
      depends on the array 'kernel' only. None for all other routers.
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
  needs_tasks: bool = False
  reads_token_ids: bool = False
  per_expert: bool = False
  from_experts: Callable | None = None
  reads_gates: bool = False
  losses: Mapping[str, RouterLoss] = dataclasses.field(default_factory=dict)
  statistics: Mapping[str, RouterLoss] = dataclasses.field(default_factory=dict)
  update: Callable | None = None
  defaults: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  pooled_module: Callable | None = None
  pooled_kernel: Callable | None = None
  pooled_options: tuple[str, ...] = ()
