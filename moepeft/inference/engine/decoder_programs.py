# SPDX-License-Identifier: Apache-2.0
"""The programs of a decoder-only model: chunks of a prompt, steps of answers.

z is the number of forms that adapters have.
"""

import functools

import jax.numpy as jnp

from moepeft.core.types import Array, Context, Tree
from moepeft.inference.engine import kv_cache, row_sampler
from moepeft.inference.engine.compiled import Programs, ints
from moepeft.inference.engine.limits import TOP, EngineConfig
from moepeft.inference.engine.per_layer import LayeredMethod, ServedModel


def rooms(settings: EngineConfig) -> tuple[int, ...]:
  """Lengths of keys and values: the last chunk's padding has places too."""
  return (*settings.rooms[:-1], settings.places + settings.chunks[0])


def plan(
  programs: Programs, model: ServedModel, settings: EngineConfig
) -> None:
  """Plans `fill`, `step` and `score`, as of the functions of these names."""
  sizes = rooms(settings)
  longest = fill(model, 1, sizes[-1])
  programs.plan_cache(longest, sizes[-1], ints(1, 1), ints(1), ints(1))
  for room in sizes:
    for t in settings.chunks:
      if t <= room:
        inputs = ints(1, t), ints(1), ints(1)
        programs.plan_method(('fill', t, room), fill(model, t, room), *inputs)
    for n in settings.batches:
      inputs = ints(n), ints(n)
      programs.plan_method(('step', n, room), step(model, n, room), *inputs)
  for t in settings.chunks:
    if t <= sizes[-1]:
      states = programs.result(('fill', t, sizes[-1]))[0]
      f = functools.partial(score, model)
      programs.plan_with(('score', t), f, states, ints(t))


def fill(model: ServedModel, t: int, room: int) -> LayeredMethod:
  """Reads t tokens of a prompt, of which `count` are real.

  Takes ids int32 [1, t], the place where the first stands, int32 [1], with
  place + t <= room, and the count, int32 [1]; says states [t, d], and experts
  {site: [t, e]}.
  """

  def ask(stack, ids, place, count):
    ctx = Context(
      token_mask=(jnp.arange(t) < count)[None],
      positions=(place + jnp.arange(t))[None],
      decode=True,
      cache_length=room,
      run_layers=stack,
    )
    return ids[None], ctx

  def say(states, told):
    return states[0, 0], {path: a[0] for path, a in told.items()}

  return LayeredMethod(
    model, 'states', 'decoder', ask, say, *_cached(1, t, room)
  )


def step(model: ServedModel, n: int, room: int) -> LayeredMethod:
  """Goes on by a token in each of n rows.

  Takes the newest tokens and where they stand, int32 [n] each; says
  `picking.Said`.
  """

  def ask(stack, token, place):
    ctx = Context(
      token_mask=jnp.ones((1, 1), bool),
      positions=place[None, None],
      decode=True,
      cache_length=room,
      run_layers=stack,
    )
    return token[None, None], ctx

  def say(logits, told):
    logits = logits[:, 0, 0].astype(jnp.float32)
    return row_sampler.step_output(
      logits, {path: a[:, 0] for path, a in told.items()}
    )

  return LayeredMethod(
    model, 'extend', 'decoder', ask, say, *_cached(n, 1, room)
  )


def _cached(n: int, t: int, room: int):
  """How a layer's keys and values come to n rows, and go back."""

  def cut(cache, rows):
    return kv_cache.cut(cache, rows, n, room)

  def put(cache, rows, places, new):
    return kv_cache.put(cache, rows, new, places, t)

  return cut, put


def score(
  model: ServedModel,
  params: Tree,
  bank: Tree,
  adapters: Array,
  states: Array,
  following: Array,
):
  """What a chunk of a prompt says of the tokens [t] that follow its own.

  Args:
    adapters: int32 [1, z].

  Returns:
    Their log-probabilities [t], and ids and log-probabilities [t, top] of the
    most probable.
  """
  peft = model.row_tree(bank, adapters[0])
  ctx = Context(token_mask=jnp.ones((1, len(states)), bool))
  variables = {'params': params, 'peft': peft}
  logits = model.module.apply(variables, states[None], ctx, method='logits')
  raw = logits[0].astype(jnp.float32)
  top = min(TOP, raw.shape[-1])
  return row_sampler.score(raw, following), *row_sampler.best(raw, top)
