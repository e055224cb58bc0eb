# SPDX-License-Identifier: Apache-2.0
"""The programs of a decoder-only model: prefill of a chunk of prompts, decode
of a token, and log-probabilities of prompts.

z is the number of adapter buckets.
"""

import functools

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context, Tree
from moepeft.inference.engine import kv_cache, sampler
from moepeft.inference.engine.compiled import Programs, int32
from moepeft.inference.engine.limits import MAX_LOGPROBS, EngineConfig
from moepeft.inference.engine.per_layer import LayeredMethod, ServedModel


def cache_lens(config: EngineConfig) -> tuple[int, ...]:
  """The cache lengths, the last one with room for the last chunk's padding."""
  return (*config.cache_lens[:-1], config.max_model_len + config.chunks[0])


def plan(programs: Programs, model: ServedModel, config: EngineConfig) -> None:
  """Plans the programs `prefill`, `decode` and `score`."""
  lengths = cache_lens(config)
  longest = prefill(model, 1, 1, lengths[-1])
  programs.plan_cache(longest, lengths[-1], int32(1, 1), int32(1), int32(1))
  for length in lengths:
    for n in config.prefill_batch_sizes:
      for t in config.chunks:
        if t <= length:
          key, method = ('prefill', n, t, length), prefill(model, n, t, length)
          programs.plan_method(key, method, int32(n, t), int32(n), int32(n))
    for n in config.batch_sizes:
      key, method = ('decode', n, length), decode(model, n, length)
      programs.plan_method(key, method, int32(n), int32(n))
  d, dtype = model.module.config.d_model, model.module.dtype
  for n in config.prefill_batch_sizes:
    for t in config.chunks:
      if t <= lengths[-1]:
        states = jax.ShapeDtypeStruct((n, t, d), dtype)
        w, f = programs.weights, functools.partial(score, model)
        args = (
          w.params,
          w.adapter_params,
          int32(n, w.num_buckets),
          states,
          int32(n, t),
        )
        programs.plan(('score', n, t), f, *args)


def prefill(model: ServedModel, n: int, t: int, length: int) -> LayeredMethod:
  """Reads a chunk of t tokens of each of n prompts.

  The inputs are ids, int32 [n, t]; the position of each row's first token,
  int32 [n], with position + t <= length; and the number of each row's ids that
  are not padding, int32 [n]. The outputs are states [n, t, d] and the experts'
  weights {path: [n, t, e]}.
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

  cache = _cache_functions(n, t, length)
  return LayeredMethod(model, 'states', 'decoder', arguments, outputs, *cache)


def decode(model: ServedModel, n: int, length: int) -> LayeredMethod:
  """Computes the next token of n sequences.

  The inputs are each sequence's last token and its position, int32 [n] each.
  The output is a `sampler.StepOutput`.
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

  cache = _cache_functions(n, 1, length)
  return LayeredMethod(model, 'extend', 'decoder', arguments, outputs, *cache)


def _cache_functions(n: int, t: int, length: int):
  """The `read_cache` and `write_cache` of a `LayeredMethod`."""

  def read_cache(cache, rows):
    return kv_cache.read_rows(cache, rows, n, length)

  def write_cache(cache, rows, positions, new):
    return kv_cache.write_rows(cache, rows, new, positions, t)

  return read_cache, write_cache


def score(
  model: ServedModel,
  params: Tree,
  adapter_params: Tree,
  adapters: Array,
  states: Array,
  next_ids: Array,
):
  """Computes the log-probability of the token after each token of a chunk.

  Args:
    adapters: int32 [n, z].
    states: the outputs of `prefill`, [n, t, d].
    next_ids: int32 [n, t], the token after each token.

  Returns:
    The log-probabilities [n, t], and the ids and the log-probabilities
    [n, t, top] of the most probable tokens.
  """

  def compute_row(adapters, states, next_ids):
    peft = model.row_tree(adapter_params, adapters)
    ctx = Context(token_mask=jnp.ones((1, len(states)), bool))
    variables = {'params': params, 'peft': peft}
    logits = model.module.apply(variables, states[None], ctx, method='logits')
    logits = logits[0].astype(jnp.float32)
    top = min(MAX_LOGPROBS, logits.shape[-1])
    return sampler.score(logits, next_ids), *sampler.top_tokens(logits, top)

  return jax.vmap(compute_row)(adapters, states, next_ids)
