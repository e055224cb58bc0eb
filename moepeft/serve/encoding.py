# SPDX-License-Identifier: Apache-2.0
"""The programs of an encoder-decoder: inputs, then steps of answers.

z is the number of forms that adapters have. Inputs and answer have the same
room: that of the longer.
"""

import jax
import jax.numpy as jnp

from moepeft.decoding import PAD
from moepeft.serve import cache as cache_lib
from moepeft.serve import picking
from moepeft.serve.programs import Programs, ints
from moepeft.serve.rows import Call
from moepeft.serve.settings import Settings, at_least
from moepeft.typing import Array, Context, Tree


def plan(
  programs: Programs,
  call: Call,
  params: Tree,
  bank: Tree,
  settings: Settings,
  z: int,
) -> Tree:
  """Plans `encode`, `attach` and `step`, as of the functions of these names.

  Returns:
    Shapes of the cache.
  """
  rooms, most = settings.rooms, settings.rooms[-1]
  states = jax.eval_shape(
    lambda *args: encode(call, *args, room=most),
    *(params, bank, ints(z), ints(most), ints()),
  )
  one = jax.eval_shape(
    lambda *args: begin(call, *args), params, bank, ints(z), states, ints()
  )
  cache = cache_lib.shapes(one, settings.slots, most)
  shared = params, bank, cache
  for s in settings.inputs:
    room = at_least(rooms, s)
    f = lambda *args, room=room: encode(call, *args, room=room)  # noqa: E731
    args = params, bank, ints(z), ints(s), ints()
    programs.plan(('encode', s), f, *args)
  for room in rooms:
    states = jax.ShapeDtypeStruct((room, states.shape[1]), states.dtype)
    f = lambda *args: attach(call, *args)  # noqa: E731
    args = *shared, ints(z), ints(), states, ints()
    programs.plan(('attach', room), f, *args, donate=(2,))
    for n in settings.batches:
      f = lambda *args, room=room: step(call, *args, room=room)  # noqa: E731
      args = *shared, ints(n, z), ints(n), ints(n), ints(n), ints(n)
      programs.plan(('step', n, room), f, *args, donate=(2,))
  return cache


def _source(length: Array, room: int) -> Context:
  return Context(token_mask=(jnp.arange(room) < length)[None])


def encode(
  call: Call,
  params: Tree,
  bank: Tree,
  adapters: Array,
  ids: Array,
  length: Array,
  room: int,
) -> Array:
  """Inputs [s], `length` of them real -> states [room, d]."""
  variables = call.variables(params, bank, adapters)
  s = ids.shape[0]
  states = call.model.apply(
    variables, ids[None], _source(length, s), method='encode'
  )
  return jnp.pad(states[0], ((0, room - s), (0, 0)))


def begin(
  call: Call,
  params: Tree,
  bank: Tree,
  adapters: Array,
  states: Array,
  length: Array,
) -> Tree:
  """One row's cache, with keys and values of its encoded inputs."""
  room = states.shape[0]
  ctx = Context(
    token_mask=jnp.ones((1, 1), bool),
    index=jnp.int32(0),
    decode=True,
    cache_length=room,
  )
  variables = call.variables(params, bank, adapters)
  ids = jnp.full((1, 1), PAD, jnp.int32)
  args = ids, ctx, states[None], _source(length, room)
  return call(variables, {}, *args, method='decode')[1]


def attach(
  call: Call,
  params: Tree,
  bank: Tree,
  cache: Tree,
  adapters: Array,
  row: Array,
  states: Array,
  length: Array,
) -> tuple[Tree, None]:
  """Puts keys and values of encoded inputs [room, d] into a slot: the cache."""
  # What the decoder says to its first token is left out by the compiler.
  new = begin(call, params, bank, adapters, states, length)
  return cache_lib.put_source(cache, row, new), None


def step(
  call: Call,
  params: Tree,
  bank: Tree,
  cache: Tree,
  adapters: Array,
  rows: Array,
  tokens: Array,
  places: Array,
  lengths: Array,
  room: int,
) -> tuple[Tree, picking.Said]:
  """As `decoding.step`.

  Args:
    lengths: int32 [n], tokens of each row's inputs.
  """

  def one(adapters, cache, token, place, length):
    ctx = Context(
      token_mask=jnp.ones((1, 1), bool),
      index=place,
      decode=True,
      cache_length=room,
    )
    variables = call.variables(params, bank, adapters)
    # Its keys and values are in the cache: it is not read.
    encoded = jnp.zeros((1, room, call.model.config.d_model), call.model.dtype)
    args = token[None, None], ctx, encoded, _source(length, room)
    logits, cache, told = call(variables, cache, *args, method='decode')
    logits = logits[0, 0].astype(jnp.float32)
    return logits, cache, {path: a[0] for path, a in told.items()}

  own = cache_lib.cut(cache, rows, rows.shape[0], room)
  args = adapters, own, tokens, places, lengths
  logits, own, told = jax.vmap(one)(*args)
  cache = cache_lib.put(cache, rows, own, places, 1)
  return cache, picking.said(logits, told)
