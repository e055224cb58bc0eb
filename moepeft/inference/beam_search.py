# SPDX-License-Identifier: Apache-2.0
"""Beam search: the most probable whole continuations that are found.

It keeps m beams of a row that go on and m that have ended; a score is the sum
of log-probabilities over length ** length_penalty. Semantics (what counts as
ended, when a row is done) are those of `transformers`' `num_beams`.

Letters: m beams, c candidates.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moepeft.core.types import Array, Batch, Tree
from moepeft.inference.decode import PAD, Memory, begin, step

# Below every sum of log-probabilities, and finite, so that it adds up.
_NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class BeamConfig:
  """Settings of a beam search.

  Attributes:
    count: m.
    length_penalty: 0 compares sums; the greater, the longer the answers.
    early_stopping: whether a row is done as soon as m of its beams have
      ended; else it goes on while a better one seems possible, or, with
      'never', until no better one is.
  """

  count: int
  length_penalty: float = 1.0
  early_stopping: bool | str = False

  def __post_init__(self):
    if self.count < 1:
      raise ValueError(f'beams is at least 1; got {self.count}')
    if self.early_stopping not in (True, False, 'never'):
      raise ValueError(
        f"early_stopping is True, False or 'never'; got {self.early_stopping!r}"
      )


@struct.dataclass
class BeamState:
  """The state of a search: beams that go on, and the best that have ended.

  Attributes:
    count: int32 scalar, tokens of each beam.
    tokens, ended: int32 [b, m, length], going on and ended.
    sums: float32 [b, m], log-probabilities of `tokens`.
    scores: float32 [b, m] of `ended`, best first.
    full: bool [b, m], whether an entry of `ended` is one.
    open: bool [b], rows that may still be bettered.
    stuck: bool scalar, whether every candidate has ended.
  """

  count: Array
  tokens: Array
  ended: Array
  sums: Array
  scores: Array
  full: Array
  open: Array
  stuck: Array
  memory: Memory


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def search(
  model: Any,
  variables: Tree,
  batch: Batch,
  ends: Array,
  length: int,
  beams: BeamConfig,
  until: Array | None = None,
) -> tuple[Array, Array]:
  """The best continuations, best first: int32 [b, m, length], float32 [b, m].

  They end with one of `ends` and then padding, or are cut at `until`.

  Args:
    batch: as of `decoding.start`.
    ends: int32 [n].
    length: of the array of tokens.
    until: tokens at most; by default `length`.
  """
  until = jnp.int32(length) if until is None else jnp.minimum(until, length)
  logits, memory = begin(model, variables, batch, length)
  b, m = logits.shape[0], beams.count
  rows = jnp.repeat(jnp.arange(b), m)
  memory = _take(memory, rows, b)
  none = jnp.full((b, m), _NEVER)
  state = BeamState(
    count=jnp.int32(0),
    tokens=jnp.full((b, m, length), PAD, jnp.int32),
    ended=jnp.full((b, m, length), PAD, jnp.int32),
    # All beams are the same at first: only one goes on.
    sums=none.at[:, 0].set(0),
    scores=none,
    full=jnp.zeros((b, m), bool),
    open=jnp.ones(b, bool),
    stuck=jnp.array(False),
    memory=memory,
  )
  state = _grow(state, logits[rows], ends, until, beams)

  def unfinished(state):
    more = jnp.any(state.open) & ~state.stuck
    return more & ~jnp.all(state.full) if _at_once(beams) else more

  def body(state):
    newest = jax.lax.dynamic_index_in_dim(
      state.tokens, state.count - 1, axis=2, keepdims=False
    ).reshape(-1)
    logits, memory = step(model, variables, state.memory, newest, state.count)
    state = state.replace(memory=memory)
    return _grow(state, logits, ends, until, beams)

  state = jax.lax.while_loop(unfinished, body, state)
  return state.ended, state.scores


def _at_once(beams: BeamConfig) -> bool:
  return beams.early_stopping is True


def _grow(
  state: BeamState, logits: Array, ends: Array, until: Array, beams: BeamConfig
) -> BeamState:
  """Adds a token to every beam.

  Args:
    logits: [b m, v].
  """
  b, m, _ = state.tokens.shape
  logs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(b, m, -1)
  v = logs.shape[-1]
  sums = (logs + state.sums[..., None]).reshape(b, -1)
  # So many that m of them go on, whatever the others end with.
  candidates = max(2, 1 + len(ends)) * m
  sums, flat = jax.lax.top_k(sums, min(candidates, m * v))
  parents, chosen = flat // v, (flat % v).astype(jnp.int32)
  tokens = _pick(state.tokens, parents).at[:, :, state.count].set(chosen)
  count = state.count + 1
  over = jnp.isin(chosen, ends) | (count >= until)
  state = _end(state, tokens, sums, over, count, beams)
  sums, places = jax.lax.top_k(jnp.where(over, sums + _NEVER, sums), m)
  parents = _pick(parents, places)
  rows = (parents + jnp.arange(b)[:, None] * m).reshape(-1)
  state = state.replace(
    count=count,
    tokens=_pick(tokens, places),
    sums=sums,
    stuck=jnp.all(over),
    memory=_take(state.memory, rows, b * m),
  )
  return state.replace(open=state.open & _hope(state, until, beams))


def _end(state, tokens, sums, over, count, beams: BeamConfig) -> BeamState:
  """Puts candidates that are over among the m best that have ended."""
  m = beams.count
  # Worse candidates are there to go on only.
  over &= jnp.arange(over.shape[1]) < m
  scores = sums / count.astype(jnp.float32) ** beams.length_penalty
  allowed = over & state.open[:, None]
  if _at_once(beams):
    allowed &= ~jnp.all(state.full, axis=1, keepdims=True)
  scores = jnp.where(allowed, scores, scores + _NEVER)
  scores = jnp.concatenate([state.scores, scores], axis=1)
  scores, best = jax.lax.top_k(scores, m)
  full = jnp.concatenate([state.full, over], axis=1)
  ended = jnp.concatenate([state.ended, tokens], axis=1)
  return state.replace(
    scores=scores, full=_pick(full, best), ended=_pick(ended, best)
  )


def _hope(state: BeamState, until: Array, beams: BeamConfig) -> Array:
  """bool [b]: whether a beam that goes on may better those that ended."""
  long = beams.early_stopping == 'never' and beams.length_penalty > 0
  size = (until if long else state.count).astype(jnp.float32)
  best = state.sums[:, 0] / size**beams.length_penalty
  worst = jnp.min(state.scores, axis=1)
  # An entry that is none is bettered by anything.
  return jnp.any(
    best[:, None] > jnp.where(state.full, worst[:, None], _NEVER), 1
  )


def _pick(array: Array, places: Array) -> Array:
  """array [b, c, ...], places int [b, n] -> [b, n, ...]."""
  places = places.reshape(places.shape + (1,) * (array.ndim - 2))
  return jnp.take_along_axis(array, places, axis=1)


def _take(memory: Memory, rows: Array, b: int) -> Memory:
  """The memory of some of its b rows, again and again where asked for."""

  def take(path, leaf):
    # Layers that are scanned have their axis before the rows.
    scanned = any(getattr(key, 'key', None) == 'layers' for key in path)
    return jnp.take(leaf, rows, axis=1 if scanned else 0)

  same = lambda leaf: jnp.take(leaf, rows, axis=0)  # noqa: E731
  return memory.replace(
    cache=jax.tree_util.tree_map_with_path(take, memory.cache),
    lengths=None if memory.lengths is None else same(memory.lengths),
    source=jax.tree.map(same, memory.source),
  )
