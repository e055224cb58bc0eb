# SPDX-License-Identifier: Apache-2.0
"""Types that every folder shares: AXIS_NAMES, Context, Routing, Batch, State.

Einsums, comments and the shapes in docstrings use one letter for an axis:
b batch, t query or target length, s key or source length, d model, n heads,
k key-value heads if they are fewer, h head size, f ffn, v vocabulary,
e experts, r rank, l layers, i the input of a router (a site's features in one
axis), p positions or buckets of them, y token types, c the output of a square
projection of d, g tasks (0 is padding), m splits of a router's weights.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import struct

# Einsum letter -> the name of an axis of stored arrays, for partition rules.
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
  'm': 'splits',
}

Array = jax.Array
Tree = Any  # a nested dict of arrays
Batch = dict[str, Array]
# Prefixes of a batch's keys: for the two answers of a pair; for a labeled
# answer and the same answer with another prompt.
PAIR = ('chosen_', 'rejected_')
JUDGED = ('', 'kl_')


@struct.dataclass
class Context:
  """The inputs of adapters and routers beside `x`; None if absent.

  Attributes:
    token_mask: bool [b, t], True on real tokens.
    prompt_mask: bool [b, t], True on the prompt, that is the tokens before the
      first trained token of their segment; in an encoder, on all real tokens.
      None if the batch has no loss mask.
    task_ids: int32 [b, t], 1.. for the tasks that the method's routers name, 0
      on padding. None if the batch has no tasks.
    embeddings: float32 [b, m, i], a vector of each example of a row that is
      given with the data, by its segment id less one; m is 1 where a row is one
      example. None where no router reads them.
    token_ids: int32 [b, t], the ids of the tokens of x, everywhere but at the
      head; in cross-attention those of the encoder at k and v.
    segment_ids: int32 [b, t], 0 on padding, 1.. for packed examples.
    positions: int32 [b, t], position within the segment; in a cached decoder
      with right-padded prompts, also each token's position in the cache.
    routing: a Routing [l, b, t, e] from an earlier pass, which the sites of a
      stack use instead of their routers, each layer with its own slice.
    first_pass: [b, t, d], the last hidden states of the base alone, for the
      sites whose mixture reads them. None where no mixture does.
    layer: int32 scalar, the layer's index within its stack.
    layer_routings: the routings that sites of this layer have made so far, for
      the sites that share a router; None outside of a stack; static.
    layer_count: the number of layers in that stack, 0 outside of it; static.
    expert_mask: bool [e], only for a router: the experts that its layer has;
      None for all. A router gives no weight to any other expert; see
      `moepeft.moe.gate.mask_experts`.
    index: int32 scalar, the next position in the cache of a decoder.
    without_adapters: whether the pass leaves out every adapter; static.
    train: whether dropout and router noise are on; static.
    decode: whether attention reads and writes its cache; static.
    cache_length: the cache's length in tokens; static.
    run_layers: replaces `nn.scan_layers.scan_layers` and has its arguments,
      (block, length, x, ctx, args) -> x; static.
  """

  token_mask: Array | None = None
  prompt_mask: Array | None = None
  task_ids: Array | None = None
  embeddings: Array | None = None
  token_ids: Array | None = None
  segment_ids: Array | None = None
  positions: Array | None = None
  routing: 'Routing | None' = None
  first_pass: Array | None = None
  layer: Array | None = None
  expert_mask: Array | None = None
  index: Array | None = None
  without_adapters: bool = struct.field(pytree_node=False, default=False)
  train: bool = struct.field(pytree_node=False, default=False)
  decode: bool = struct.field(pytree_node=False, default=False)
  cache_length: int = struct.field(pytree_node=False, default=0)
  layer_count: int = struct.field(pytree_node=False, default=0)
  layer_routings: 'LayerRoutings | None' = struct.field(
    pytree_node=False, default=None
  )
  run_layers: Callable | None = struct.field(pytree_node=False, default=None)

  def at_layer(self, layer: Array) -> 'Context':
    """The context of one call of the layer with this index."""
    return self.replace(layer=layer, layer_routings=LayerRoutings())


@struct.dataclass
class Routing:
  """A router's decision for each token.

  Attributes:
    logits: float32 [..., e], before expert dropout and selection; -inf for
      experts that the layer does not have.
    combine_weights: float32 [..., e], the weights of the experts' outputs.
    k: the number of experts with weight, the same for every token; None if it
      differs or all of them have weight. Static.
    selects: whether tokens have zero weights, and unlike numbers of them.
      Static.
    aux: the router's metrics by name, float32 [..., *any]: a loss or a
      statistic of its entry reads their sums over the real tokens.
  """

  logits: Array
  combine_weights: Array
  k: int | None = struct.field(pytree_node=False, default=None)
  selects: bool = struct.field(pytree_node=False, default=False)
  aux: dict[str, Array] = struct.field(default_factory=dict)

  @property
  def sparse(self) -> bool:
    """Whether each token is routed to fewer than all experts."""
    experts = self.combine_weights.shape[-1]
    return self.selects or (self.k is not None and self.k < experts)


class LayerRoutings:
  """The routings of one call of a layer, while it is traced."""

  def __init__(self):
    self._entries: list[tuple[str, Array | None, Routing]] = []

  def get(self, adapter: str, x: Array | None) -> Routing | None:
    """The routing that an adapter of this name has made from this array.

    None stands for whatever the first site of the layer has read.
    """
    for name, read, routing in self._entries:
      if name == adapter and read is x:
        return routing
    return None

  def put(self, adapter: str, x: Array | None, routing: Routing) -> None:
    self._entries.append((adapter, x, routing))


@struct.dataclass
class State:
  """The training state.

  Attributes:
    step: int32 scalar, the number of updates.
    trainable: the collection to differentiate: 'peft', or 'params' for `full`.
    frozen: the other collection, without gradient and optimizer state.
    opt: the optimizer's state for `trainable`.
    rng: the key that every step folds its number into.
    reference: frozen adapters of an objective's reference model; {} for none.
      A resumed run reads them again; checkpoints do not have them.
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
