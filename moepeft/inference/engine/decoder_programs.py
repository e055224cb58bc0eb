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
  """Plans the programs `prefill`, `decode`, `score` and, for adapters that read
  a first pass of the base, `first_pass`."""
  lengths, chunks = cache_lens(config), config.chunks
  if model.reads_prompt:
    chunks = whole_prompt_lens(config)
  d, dtype = model.module.config.d_model, model.module.dtype

  def states(n, t):
    return jax.ShapeDtypeStruct((n, t, d), dtype)

  def router_inputs(n, t):
    first_pass = {'first_pass': states(n, t)} if model.two_pass else {}
    return first_pass | model.embeddings(n)

  def prompts(n, t):
    return int32(n, t), int32(n), int32(n), int32(n), int32(n)

  def plan_chunk(n, t, length):
    if model.two_pass:
      method = prefill(model, n, t, length, first_pass=True)
      inputs = *prompts(n, t), model.embeddings(n)
      programs.plan_method(('first_pass', n, t, length), method, *inputs)

  longest = lengths[-1]
  programs.plan_cache(
    prefill(model, 1, 1, longest),
    longest,
    *(*prompts(1, 1), router_inputs(1, 1)),
    first_pass=prefill(model, 1, 1, longest, first_pass=True)
    if model.two_pass
    else None,
  )
  for length in lengths:
    for n in config.prefill_batch_sizes:
      for t in chunks:
        if t <= length:
          plan_chunk(n, t, length)
          key, method = ('prefill', n, t, length), prefill(model, n, t, length)
          programs.plan_method(key, method, *prompts(n, t), router_inputs(n, t))
    for n in config.batch_sizes:
      for t in config.decode_lens:
        plan_chunk(n, t, length)
        key, method = ('decode', n, t, length), decode(model, n, t, length)
        rows = int32(n, t), int32(n), int32(n), int32(n), router_inputs(n, t)
        programs.plan_method(key, method, *rows)
  for n in config.prefill_batch_sizes:
    for t in chunks:
      if t <= lengths[-1]:
        w, f = programs.weights, functools.partial(score, model)
        args = (
          w.params,
          w.adapter_params,
          int32(n, w.num_buckets),
          states(n, t),
          int32(n, t),
          int32(n),
          model.embeddings(n),
        )
        programs.plan(('score', n, t), f, *args)


def whole_prompt_lens(config: EngineConfig) -> tuple[int, ...]:
  """The lengths to which prompts that are read in one chunk are padded."""
  return tuple(sorted({*config.chunks, *cache_lens(config)}))


def prefill(
  model: ServedModel, n: int, t: int, length: int, first_pass: bool = False
) -> LayeredMethod:
  """Reads a chunk of t tokens of each of n prompts.

  The inputs are ids, int32 [n, t]; the position of each row's first token,
  int32 [n], with position + t <= length; the number of each row's ids that
  are not padding; the number of its tokens that are the prompt; and its task,
  int32 [n] each; and the inputs of routers (`ServedModel.fields`). The outputs
  are states [n, t, d] and the experts' weights {path: [n, t, e]}.

  Args:
    first_pass: whether it is that of the base alone, with a cache of its own.
  """

  def arguments(stack, ids, position, count, prompt_size, task, inputs):
    mask = (jnp.arange(t) < count)[None]
    positions = (position + jnp.arange(t))[None]
    ctx = Context(
      token_mask=mask,
      prompt_mask=mask & (positions < prompt_size),
      task_ids=jnp.where(mask, task, 0),
      positions=positions,
      **model.fields(inputs),
      decode=True,
      without_adapters=first_pass,
      cache_length=length,
      run_layers=stack,
    )
    return ids[None], ctx

  def outputs(states, weights, *rows):
    return states[:, 0], weights

  cache = _cache_functions(n, t, length, first_pass)
  return LayeredMethod(model, 'states', 'decoder', arguments, outputs, *cache)


def decode(model: ServedModel, n: int, t: int, length: int) -> LayeredMethod:
  """Computes the next token of n sequences, and those after proposed tokens.

  The inputs are each sequence's last token and the tokens that are proposed
  after it, int32 [n, t]; the position of the first, the number of tokens that
  are not padding, and the task, int32 [n] each; and the inputs of routers as in
  `prefill`. The output is a `sampler.StepOutput`.
  """

  def arguments(stack, ids, position, count, task, inputs):
    mask = (jnp.arange(t) < count)[None]
    ctx = Context(
      token_mask=mask,
      # The cache has what routers read of the prompt.
      prompt_mask=jnp.zeros((1, t), bool),
      task_ids=jnp.where(mask, task, 0),
      positions=(position + jnp.arange(t))[None],
      **model.fields(inputs),
      decode=True,
      cache_length=length,
      run_layers=stack,
    )
    return ids[None], ctx

  def outputs(logits, weights, *rows):
    return sampler.step_output(logits[:, 0].astype(jnp.float32), weights)

  cache = _cache_functions(n, t, length)
  return LayeredMethod(model, 'extend', 'decoder', arguments, outputs, *cache)


def _cache_functions(n: int, t: int, length: int, first_pass: bool = False):
  """The `read_cache` and `write_cache` of a `LayeredMethod`."""

  def read_cache(cache, rows):
    part = kv_cache.of_pass(cache, first_pass)
    return kv_cache.read_rows(part, rows, n, length)

  def write_cache(cache, rows, positions, new):
    part = kv_cache.of_pass(cache, first_pass)
    part = kv_cache.write_rows(part, rows, new, positions, t)
    return {**cache, **({kv_cache.FIRST_PASS: part} if first_pass else part)}

  return read_cache, write_cache


def score(
  model: ServedModel,
  params: Tree,
  adapter_params: Tree,
  adapters: Array,
  states: Array,
  next_ids: Array,
  tasks: Array,
  inputs: dict[str, Array],
):
  """Computes the log-probability of the token after each token of a chunk.

  Args:
    adapters: int32 [n, z].
    states: the outputs of `prefill`, [n, t, d].
    next_ids: int32 [n, t], the token after each token.
    tasks: int32 [n].
    inputs: those of routers, without a first pass.

  Returns:
    The log-probabilities [n, t], and the ids and the log-probabilities
    [n, t, top] of the most probable tokens.
  """

  def compute_row(adapters, states, next_ids, task, inputs):
    peft = model.row_tree(adapter_params, adapters)
    mask = jnp.ones((1, len(states)), bool)
    task_ids = jnp.where(mask, task, 0)
    ctx = Context(token_mask=mask, task_ids=task_ids, **model.fields(inputs))
    variables = {'params': params, 'peft': peft}
    logits = model.module.apply(variables, states[None], ctx, method='logits')
    logits = logits[0].astype(jnp.float32)
    top = min(MAX_LOGPROBS, logits.shape[-1])
    return sampler.score(logits, next_ids), *sampler.top_tokens(logits, top)

  return jax.vmap(compute_row)(adapters, states, next_ids, tasks, inputs)
