# SPDX-License-Identifier: Apache-2.0
"""The programs of a decoder-only model: chunks of a prompt, steps of answers.

z is the number of forms that adapters have.
"""

import jax
import jax.numpy as jnp

from moepeft.serve import cache as cache_lib
from moepeft.serve import picking
from moepeft.serve.programs import Programs, ints
from moepeft.serve.rows import Call
from moepeft.serve.settings import TOP, Settings
from moepeft.typing import Array, Context, Tree


def rooms(settings: Settings) -> tuple[int, ...]:
  """Lengths of keys and values: the last chunk's padding has places too."""
  return (*settings.rooms[:-1], settings.places + settings.least)


def plan(
  programs: Programs,
  call: Call,
  params: Tree,
  bank: Tree,
  settings: Settings,
  z: int,
) -> Tree:
  """Plans `fill`, `score` and `step`, as of the functions of these names.

  Returns:
    Shapes of the cache.
  """
  sizes = rooms(settings)
  one = jax.eval_shape(
    lambda *args: extend(call, *args, room=sizes[-1])[1],
    *(params, bank, ints(z), {}, ints(1), ints(), ints()),
  )
  cache = cache_lib.shapes(one, settings.slots, sizes[-1])
  shared = params, bank, cache
  for room in sizes:
    for t in settings.chunks:
      if t <= room:
        f = lambda *args, room=room: fill(call, *args, room=room)  # noqa: E731
        args = *shared, ints(z), ints(), ints(t), ints(), ints()
        programs.plan(('fill', t, room), f, *args, donate=(2,))
    for n in settings.batches:
      f = lambda *args, room=room: step(call, *args, room=room)  # noqa: E731
      args = *shared, ints(n, z), ints(n), ints(n), ints(n)
      programs.plan(('step', n, room), f, *args, donate=(2,))
  for t in settings.chunks:
    if t <= sizes[-1]:
      states = programs.shapes(('fill', t, sizes[-1]))[1][0]
      f = lambda *args: score(call, *args)  # noqa: E731
      programs.plan(('score', t), f, params, bank, ints(z), states, ints(t))
  return cache


def extend(
  call: Call, params, bank, adapters, cache, ids, place, count, room: int
):
  """One row's states [t, d] of ids [t], the cache, and experts."""
  t = ids.shape[0]
  ctx = Context(
    token_mask=(jnp.arange(t) < count)[None],
    positions=(place + jnp.arange(t))[None],
    decode=True,
    cache_length=room,
  )
  variables = call.variables(params, bank, adapters)
  states, cache, told = call(variables, cache, ids[None], ctx, method='states')
  return states[0], cache, told


def fill(
  call: Call,
  params: Tree,
  bank: Tree,
  cache: Tree,
  adapters: Array,
  row: Array,
  ids: Array,
  place: Array,
  count: Array,
  room: int,
):
  """Reads t tokens of a prompt.

  Args:
    adapters: int32 [z].
    ids: int32 [t], `count` of them real.
    place: int32 scalar, where the first stands; place + t <= room.

  Returns:
    The cache, and (states [t, d], {site: [t, e]}).
  """
  rows, places = row[None], place[None]
  own = jax.tree.map(lambda a: a[0], cache_lib.cut(cache, rows, 1, room))
  states, own, told = extend(
    call, params, bank, adapters, own, ids, place, count, room
  )
  own = jax.tree.map(lambda a: a[None], own)
  cache = cache_lib.put(cache, rows, own, places, ids.shape[0])
  return cache, (states, told)


def score(
  call: Call,
  params: Tree,
  bank: Tree,
  adapters: Array,
  states: Array,
  following: Array,
):
  """What a chunk of a prompt says of the tokens [t] that follow its own.

  Returns:
    Their log-probabilities [t], and ids and log-probabilities [t, top] of the
    most probable.
  """
  variables = call.variables(params, bank, adapters)
  ctx = Context(token_mask=jnp.ones((1, len(states)), bool))
  logits = call.model.apply(variables, states[None], ctx, method='logits')
  raw = logits[0].astype(jnp.float32)
  top = min(TOP, raw.shape[-1])
  return picking.score(raw, following), *picking.best(raw, top)


def step(
  call: Call,
  params: Tree,
  bank: Tree,
  cache: Tree,
  adapters: Array,
  rows: Array,
  tokens: Array,
  places: Array,
  room: int,
) -> tuple[Tree, picking.Said]:
  """Goes on by a token in each of n rows.

  Args:
    adapters: int32 [n, z].
    rows: int32 [n], slots; a slot that is there twice is the same in all.
    tokens: int32 [n], the newest; places: int32 [n], where they stand.

  Returns:
    The cache, and what it says.
  """

  def one(adapters, cache, token, place):
    ctx = Context(
      token_mask=jnp.ones((1, 1), bool),
      positions=place[None, None],
      decode=True,
      cache_length=room,
    )
    variables = call.variables(params, bank, adapters)
    logits, cache, told = call(
      variables, cache, token[None, None], ctx, method='extend'
    )
    logits = logits[0, 0].astype(jnp.float32)
    return logits, cache, {path: a[0] for path, a in told.items()}

  own = cache_lib.cut(cache, rows, rows.shape[0], room)
  logits, own, told = jax.vmap(one)(adapters, own, tokens, places)
  cache = cache_lib.put(cache, rows, own, places, 1)
  return cache, picking.said(logits, told)
