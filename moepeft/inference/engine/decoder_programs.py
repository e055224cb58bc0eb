# SPDX-License-Identifier: Apache-2.0
"""The programs of a decoder-only model: prefill of a chunk of prompts, decode
of a token, and log-probabilities of prompts.

z is the number of buckets that adapters have.
"""

import functools

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context, Tree
from moepeft.inference.engine import kv_cache, sampler
from moepeft.inference.engine.compiled import Programs, ints
from moepeft.inference.engine.limits import TOP, EngineConfig
from moepeft.inference.engine.per_layer import LayeredMethod, ServedModel


def cache_lens(config: EngineConfig) -> tuple[int, ...]:
  """Lengths of keys and values: the last chunk's padding has entries too."""
  return (*config.cache_lens[:-1], config.max_model_len + config.chunks[0])


def plan(programs: Programs, model: ServedModel, config: EngineConfig) -> None:
  """Plans `prefill`, `decode` and `score`, the functions of these names."""
  lengths = cache_lens(config)
  longest = prefill(model, 1, 1, lengths[-1])
  programs.plan_cache(longest, lengths[-1], ints(1, 1), ints(1), ints(1))
  for length in lengths:
    for n in config.prefill_batch_sizes:
      for t in config.chunks:
        if t <= length:
          key, method = ('prefill', n, t, length), prefill(model, n, t, length)
          programs.plan_method(key, method, ints(n, t), ints(n), ints(n))
    for n in config.batch_sizes:
      key, method = ('decode', n, length), decode(model, n, length)
      programs.plan_method(key, method, ints(n), ints(n))
  d, dtype = model.module.config.d_model, model.module.dtype
  for n in config.prefill_batch_sizes:
    for t in config.chunks:
      if t <= lengths[-1]:
        states = jax.ShapeDtypeStruct((n, t, d), dtype)
        w, f = programs.weights, functools.partial(score, model)
        args = w.params, w.bank, ints(n, w.buckets), states, ints(n, t)
        programs.plan(('score', n, t), f, *args)


def prefill(model: ServedModel, n: int, t: int, length: int) -> LayeredMethod:
  """Reads t tokens of each of n prompts, of which `count` are real.

  Takes ids int32 [n, t], the position of each first one, int32 [n], with
  position + t <= length, and the counts, int32 [n]; gives states [n, t, d], and
  experts' weights {site: [n, t, e]}.
  """

  def arguments(stack, ids, position, count):
    ctx = Context(
      token_mask=(jnp.arange(t) < count)[None],
      positions=(position + jnp.arange(t))[None],
      decode=True,
      cache_length=length,
      run_layers=stack,
    )
    return ids[None], ctx

  def outputs(states, weights, *rows):
    return states[:, 0], weights

  cache = _cached(n, t, length)
  return LayeredMethod(model, 'states', 'decoder', arguments, outputs, *cache)


def decode(model: ServedModel, n: int, length: int) -> LayeredMethod:
  """Continues n sequences by a token.

  Takes the newest tokens and their positions, int32 [n] each; gives
  `sampler.StepOutput`.
  """

  def arguments(stack, token, position):
    ctx = Context(
      token_mask=jnp.ones((1, 1), bool),
      positions=position[None, None],
      decode=True,
      cache_length=length,
      run_layers=stack,
    )
    return token[None, None], ctx

  def outputs(logits, weights, *rows):
    logits = logits[:, 0, 0].astype(jnp.float32)
    return sampler.step_output(
      logits, {path: a[:, 0] for path, a in weights.items()}
    )

  cache = _cached(n, 1, length)
  return LayeredMethod(model, 'extend', 'decoder', arguments, outputs, *cache)


def _cached(n: int, t: int, length: int):
  """(cut, put) of a layer's keys and values."""

  def cut(cache, rows):
    return kv_cache.cut(cache, rows, n, length)

  def put(cache, rows, positions, new):
    return kv_cache.put(cache, rows, new, positions, t)

  return cut, put


def score(
  model: ServedModel,
  params: Tree,
  bank: Tree,
  adapters: Array,
  states: Array,
  next_ids: Array,
):
  """Log-probabilities of the tokens that follow those of a chunk.

  Args:
    adapters: int32 [n, z].
    states: of `prefill`, [n, t, d].
    next_ids: int32 [n, t].

  Returns:
    Their log-probabilities [n, t], and ids and log-probabilities [n, t, top]
    of the most probable tokens.
  """

  def of_row(adapters, states, next_ids):
    peft = model.row_tree(bank, adapters)
    ctx = Context(token_mask=jnp.ones((1, len(states)), bool))
    variables = {'params': params, 'peft': peft}
    logits = model.module.apply(variables, states[None], ctx, method='logits')
    raw = logits[0].astype(jnp.float32)
    top = min(TOP, raw.shape[-1])
    return sampler.score(raw, next_ids), *sampler.best(raw, top)

  return jax.vmap(of_row)(adapters, states, next_ids)
