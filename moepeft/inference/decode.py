# SPDX-License-Identifier: Apache-2.0
"""Token by token with a cache, in one compiled loop: T5 and decoders.

Shapes are static: a batch of prompts, padded on the right, is read at once,
and `advance` then adds tokens to all rows until they have ended. It may be
called again and again for a few tokens each (streaming): how many is data.
A model with the method `extend` is decoder-only, any other encodes first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moepeft.core.types import Array, Batch, Context, Tree
from moepeft.inference import sampling
from moepeft.inference.sampling import Sampling
from moepeft.models.sites import context

PAD, EOS = 0, 1


@struct.dataclass
class Memory:
  """What a model keeps of a batch from token to token.

  Attributes:
    cache: keys and values.
    lengths: int32 [b], tokens of each prompt; None of an encoder-decoder.
    source: an encoder-decoder's states [b, s, d] and their context, or None.
    room: the cache's length in tokens; static.
  """

  cache: Tree
  lengths: Array | None
  source: tuple[Array, Context] | None
  room: int = struct.field(pytree_node=False)


@struct.dataclass
class How:
  """How continuations are chosen and when they end.

  Attributes:
    sampling: greedy by default.
    ends: int32 [n], ids that end a row.
    least: tokens before which none of `ends` is chosen; None for no such.
  """

  sampling: Sampling
  ends: Array
  least: Array | None = None


@struct.dataclass
class Rows:
  """Continuations that are under way.

  Attributes:
    count: int32 scalar, tokens chosen so far.
    tokens: int32 [b, length]: `count` tokens of each row, then padding.
    done: bool [b], rows that have ended.
    keys: [b], of each row's draws; None where all is greedy.
    seen: bool [b, v], what a repetition penalty is for; None without one.
  """

  count: Array
  tokens: Array
  done: Array
  keys: Array | None
  seen: Array | None
  memory: Memory


def greedy(
  model: Any, variables: Tree, batch: Batch, length: int, eos: int = EOS
) -> Array:
  """The most probable continuation, token by token: int32 [b, length].

  Rows end with `eos`, then padding; a row that never ends is cut. The loop
  stops where every row has ended.

  Args:
    batch: see `start`.
    length: tokens to generate at most.
  """
  how = How(Sampling(), jnp.array([eos], jnp.int32))
  rows = start(model, variables, batch, how, length)
  return advance(model, variables, rows, how, length).tokens


@functools.partial(jax.jit, static_argnums=(0, 4))
def start(
  model: Any,
  variables: Tree,
  batch: Batch,
  how: How,
  length: int,
  keys: Array | None = None,
) -> Rows:
  """Reads prompts and chooses the first token of each row.

  Args:
    batch: inputs [b, s] and, optionally, inputs_mask: prompts of a decoder
      stand at the left, padded on the right.
    length: of the array of tokens; the loop may stop before it.
    keys: [b], one for each row's draws; a row's are its own, whatever stands
      beside it.
  """
  logits, memory = begin(model, variables, batch, length)
  b, v = logits.shape
  seen = None
  if how.sampling.repetition_penalty is not None:
    seen = _seen(batch, memory, v)
  rows = Rows(
    jnp.int32(0),
    jnp.full((b, length), PAD, jnp.int32),
    jnp.zeros(b, bool),
    keys,
    seen,
    memory,
  )
  return _add(rows, logits, how)


def advance(
  model: Any, variables: Tree, rows: Rows, how: How, until: Array
) -> Rows:
  """Adds tokens until there are `until` of each row, or all have ended.

  The rows that were given are used up: their cache is written over.
  """
  cache, rest = rows.memory.cache, rows.memory.replace(cache={})
  return _advance(
    model, variables, cache, rows.replace(memory=rest), how, until
  )


# The cache alone: others may be arrays of the caller, handed through.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(model, variables, cache, rows, how, until) -> Rows:
  rows = rows.replace(memory=rows.memory.replace(cache=cache))
  until = jnp.minimum(until, rows.tokens.shape[1])

  def unfinished(rows):
    return (rows.count < until) & ~jnp.all(rows.done)

  def body(rows):
    newest = jax.lax.dynamic_index_in_dim(
      rows.tokens, rows.count - 1, axis=1, keepdims=False
    )
    logits, memory = step(model, variables, rows.memory, newest, rows.count)
    return _add(rows.replace(memory=memory), logits, how)

  return jax.lax.while_loop(unfinished, body, rows)


def begin(
  model: Any, variables: Tree, batch: Batch, length: int
) -> tuple[Array, Memory]:
  """Reads prompts: (logits [b, v] of each row's first token, memory).

  Args:
    length: tokens that the memory shall have room for after the prompts. A
      model that has learned its positions must have those of all real ones.

  Raises:
    ValueError: prompts are padded beyond learned positions.
  """
  ids = batch['inputs']
  ctx = context(batch, 'inputs', ids, train=False)
  if not hasattr(model, 'extend'):
    encoded = model.apply(variables, ids, ctx, method='encode')
    memory = Memory({}, None, (encoded, ctx), length)
    return step(
      model, variables, memory, jnp.full(len(ids), PAD, jnp.int32), jnp.int32(0)
    )
  _check_places(model.config, ids.shape[1])
  lengths = jnp.sum(ctx.token_mask, axis=1, dtype=jnp.int32)
  places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  memory = Memory({}, lengths, None, ids.shape[1] + length)
  ctx = ctx.replace(positions=places)
  return _extend(model, variables, memory, ids, ctx, lengths - 1)


def step(
  model: Any, variables: Tree, memory: Memory, tokens: Array, count: Array
) -> tuple[Array, Memory]:
  """(logits [b, v] of what follows `tokens` [b], memory).

  Args:
    count: int32 scalar, which generated token `tokens` are: 1 for the first,
      and 0 for the padding that an encoder-decoder begins with.
  """
  real = jnp.ones((len(tokens), 1), bool)
  ctx = Context(token_mask=real)
  if memory.source is None:
    ctx = ctx.replace(positions=(memory.lengths + count - 1)[:, None])
    return _extend(model, variables, memory, tokens[:, None], ctx)
  ctx = ctx.replace(index=count, decode=True, cache_length=memory.room)
  logits, changed = model.apply(
    _with_cache(variables, memory),
    tokens[:, None],
    ctx,
    *memory.source,
    method='decode',
    mutable=['cache'],
  )
  return logits[:, 0], memory.replace(cache=changed['cache'])


def _extend(model, variables, memory, ids, ctx, last=None):
  logits, changed = model.apply(
    _with_cache(variables, memory),
    ids,
    ctx.replace(decode=True, cache_length=memory.room),
    last,
    method='extend',
    mutable=['cache'],
  )
  return logits[:, 0], memory.replace(cache=changed['cache'])


def _check_places(config: Any, s: int) -> None:
  # Padding there would be no number, which no mask takes out of a sum.
  if config.positions == 'learned' and s > config.length:
    raise ValueError(
      f'the model has learned {config.length:,} positions; got prompts padded '
      f'to {s:,}: pad them to less'
    )


def _with_cache(variables: Tree, memory: Memory) -> Tree:
  # The first call makes the cache.
  return {**variables, 'cache': memory.cache} if memory.cache else variables


def _seen(batch: Batch, memory: Memory, v: int) -> Array:
  """bool [b, v]: a decoder's prompt, or the padding that T5 begins with."""
  b = len(batch['inputs'])
  if memory.lengths is None:
    return jnp.zeros((b, v), bool).at[:, PAD].set(True)
  ids = batch['inputs']
  real = jnp.arange(ids.shape[1]) < memory.lengths[:, None]
  # v is no id: what is not real is dropped.
  ids = jnp.where(real, ids, v)
  return jnp.zeros((b, v), bool).at[jnp.arange(b)[:, None], ids].set(True)


def _add(rows: Rows, logits: Array, how: How) -> Rows:
  """Chooses the next token of each row."""
  logits = logits.astype(jnp.float32)
  if rows.seen is not None:
    penalty = how.sampling.repetition_penalty
    logits = sampling.penalise(logits, rows.seen, penalty)
  if how.least is not None:
    early = jnp.where(rows.count < how.least, -jnp.inf, 0)
    logits = logits.at[:, how.ends].add(early)
  keys = rows.keys
  if keys is not None:
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, rows.count)
  chosen = sampling.choose(logits, how.sampling, keys)
  chosen = jnp.where(rows.done, PAD, chosen)
  seen = rows.seen
  if seen is not None:
    seen = seen.at[jnp.arange(len(chosen)), chosen].set(True)
  return rows.replace(
    count=rows.count + 1,
    tokens=rows.tokens.at[:, rows.count].set(chosen),
    done=rows.done | jnp.isin(chosen, how.ends),
    seen=seen,
  )
