# SPDX-License-Identifier: Apache-2.0
"""The programs of an encoder-decoder: inputs, then steps of answers.

z is the number of forms that adapters have. Inputs and answer have the same
room: that of the longer.
"""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.inference.decode import PAD
from moepeft.inference.engine import kv_cache, row_sampler
from moepeft.inference.engine.compiled import Programs, ints
from moepeft.inference.engine.limits import EngineConfig, at_least
from moepeft.inference.engine.per_layer import LayeredMethod, ServedModel


def plan(
  programs: Programs, model: ServedModel, settings: EngineConfig
) -> None:
  """Plans `encode`, `attach` and `step`, as of the functions of these names."""
  for s in settings.inputs:
    room = at_least(settings.rooms, s)
    method = encode(model, s, room)
    programs.plan_method(('encode', s), method, ints(1, s), ints(1))
  d, dtype = model.module.config.d_model, model.module.dtype
  most = settings.rooms[-1]
  states = jax.ShapeDtypeStruct((1, most, d), dtype)
  programs.plan_cache(attach(model, most), most, states, ints(1))
  for room in settings.rooms:
    states = jax.ShapeDtypeStruct((1, room, d), dtype)
    programs.plan_method(('attach', room), attach(model, room), states, ints(1))
    for n in settings.batches:
      inputs = ints(n), ints(n), ints(n)
      programs.plan_method(('step', n, room), step(model, n, room), *inputs)


def _source(length: Array, room: int, stack=None) -> Context:
  mask = (jnp.arange(room) < length)[None]
  return Context(token_mask=mask, run_layers=stack)


def encode(model: ServedModel, s: int, room: int) -> LayeredMethod:
  """Reads inputs, int32 [1, s], `length` of them real, int32 [1]: says states
  [room, d]."""

  def ask(stack, ids, length):
    return ids[None], _source(length, s, stack)

  def say(states, told):
    return jnp.pad(states[0, 0], ((0, room - s), (0, 0)))

  return LayeredMethod(model, 'encode', 'encoder', ask, say)


def attach(model: ServedModel, room: int) -> LayeredMethod:
  """Puts keys and values of encoded inputs [1, room, d], of a length int32
  [1], into a slot; says nothing."""

  def ask(stack, states, length):
    ctx = Context(
      token_mask=jnp.ones((1, 1), bool),
      index=jnp.int32(0),
      decode=True,
      cache_length=room,
      run_layers=stack,
    )
    ids = jnp.full((1, 1), PAD, jnp.int32)
    return ids, ctx, states[None], _source(length, room)

  def put(cache, rows, places, new):
    return kv_cache.put_source(cache, rows[0], new)

  # What the decoder says to its first token is left out by the compiler.
  return LayeredMethod(
    model, 'decode', 'decoder', ask, lambda *_: (), lambda *_: {}, put
  )


def step(model: ServedModel, n: int, room: int) -> LayeredMethod:
  """As `decoding.step`.

  Takes one more, int32 [n]: tokens of each row's inputs.
  """

  def ask(stack, token, place, length):
    ctx = Context(
      token_mask=jnp.ones((1, 1), bool),
      index=place,
      decode=True,
      cache_length=room,
      run_layers=stack,
    )
    # Its keys and values are in the cache: it is not read.
    module = model.module
    encoded = jnp.zeros((1, room, module.config.d_model), module.dtype)
    return token[None, None], ctx, encoded, _source(length, room)

  def say(logits, told):
    logits = logits[:, 0, 0].astype(jnp.float32)
    return row_sampler.step_output(
      logits, {path: a[:, 0] for path, a in told.items()}
    )

  def cut(cache, rows):
    return kv_cache.cut(cache, rows, n, room)

  def put(cache, rows, places, new):
    return kv_cache.put(cache, rows, new, places, 1)

  return LayeredMethod(model, 'decode', 'decoder', ask, say, cut, put)
