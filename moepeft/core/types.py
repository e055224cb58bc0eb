# SPDX-License-Identifier: Apache-2.0
"""Types that every folder shares: AXIS_NAMES, Context, Routing, Batch, State.

One letter stands for an axis in einsums, comments and shapes of docstrings:
b batch, t query or target length, s key or source length, d model, n heads,
k heads of keys and values where they are fewer, h head size, f ffn,
v vocabulary, e experts, r rank, l layers, i what a router reads (a site's
features in one axis), p positions or buckets of them, y token types, c what a
projection makes of d where that is d once more, g tasks (0 is padding).
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import struct

# Names of the axes of stored arrays, which partition rules name, by the letters
# of einsums.
AXIS_NAMES = {
  'd': 'embed',
  'n': 'heads',
  'k': 'kv_heads',
  'h': 'head_dim',
  'f': 'mlp',
  'v': 'vocab',
  'e': 'experts',
  'r': 'rank',
  'l': 'layers',
  'i': 'router_input',
  'p': 'positions',
  's': 'keys',
  'y': 'token_types',
  'c': 'embed_out',
  'g': 'tasks',
}

Array = jax.Array
Tree = Any  # a nested dict of arrays
Batch = dict[str, Array]
# Prefixes of a batch's keys: of the two answers of a pair; of a judged answer
# and the same answer to another prompt.
PAIR = ('chosen_', 'rejected_')
JUDGED = ('', 'kl_')


@struct.dataclass
class Context:
  """The inputs of adapters and routers beside `x`; None where absent.

  Attributes:
    token_mask: bool [b, t], True where `x` holds a real token.
    prompt_mask: bool [b, t], True on the tokens before the first trained one
      of their segment, the prompt; of an encoder on all real tokens. None
      where the batch does not say what is trained.
    task_ids: int32 [b, t], 1.. for each of the tasks that the method's routers
      name, 0 on padding; of batches that say which task each example is of.
    segment_ids: int32 [b, t], 0 on padding, 1.. for packed examples.
    positions: int32 [b, t], position within the segment; in a cached decoder
      with right-padded prompts, also where each token is written.
    routing: a Routing [l, b, t, e] that an earlier pass has made, used by the
      sites of a stack instead of their own routers, each layer its own part.
    layer: int32 scalar, the layer's number within its stack.
    layer_count: how many layers that stack has, 0 outside of it; static.
    expert_mask: bool [e], set for a router alone: the experts that its layer
      has; None where it has all. A router gives the others no weight; see
      `moepeft.moe.gate.mask_experts`.
    index: int32 scalar, the position that a cached decoder writes next.
    train: whether dropout and router noise are on; static.
    decode: whether attention reads and writes its cache; static.
    cache_length: the cache's length in tokens; static.
    run_layers: replaces `nn.scan_layers.scan_layers`, whose arguments it
      takes: (block, length, x, ctx, args) -> x; static.
  """

  token_mask: Array | None = None
  prompt_mask: Array | None = None
  task_ids: Array | None = None
  segment_ids: Array | None = None
  positions: Array | None = None
  routing: 'Routing | None' = None
  layer: Array | None = None
  expert_mask: Array | None = None
  index: Array | None = None
  train: bool = struct.field(pytree_node=False, default=False)
  decode: bool = struct.field(pytree_node=False, default=False)
  cache_length: int = struct.field(pytree_node=False, default=0)
  layer_count: int = struct.field(pytree_node=False, default=0)
  run_layers: Callable | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Routing:
  """A router's decision for each token.

  Attributes:
    logits: float32 [..., e], before expert dropout and selection; -inf of
      experts that the layer does not have.
    combine_weights: float32 [..., e], what the experts are mixed with.
    k: how many experts have weight, the same for every token; None where their
      number differs or all of them have some. Static.
    selects: whether a token has weights of zero, their number differing from
      token to token. Static.
    aux: the router's own figures by name, float32 [..., *any]: a loss or a
      statistic of its entry reads their sums over the real tokens.
  """

  logits: Array
  combine_weights: Array
  k: int | None = struct.field(pytree_node=False, default=None)
  selects: bool = struct.field(pytree_node=False, default=False)
  aux: dict[str, Array] = struct.field(default_factory=dict)

  @property
  def sparse(self) -> bool:
    """Whether a token is sent to some of the experts and no others."""
    experts = self.combine_weights.shape[-1]
    return self.selects or (self.k is not None and self.k < experts)


@struct.dataclass
class State:
  """The training state.

  Attributes:
    step: int32 scalar, updates done.
    trainable: what `jax.grad` sees: 'peft', or 'params' for `full`.
    frozen: the other collection; no gradient, no optimizer state.
    opt: the optimizer's state over `trainable`.
    rng: the key that every step folds its number into.
    reference: adapters that stay as they are, which an objective measures
      against; {} for none. Read anew by a run that goes on, never saved.
  """

  step: Array
  trainable: Tree
  frozen: Tree
  opt: Tree
  rng: Array
  reference: Tree = struct.field(default_factory=dict)


class Router(Protocol):
  """Reads activations `x` [..., d]; float32 inside."""

  def __call__(self, x: Array, ctx: Context) -> Routing: ...
