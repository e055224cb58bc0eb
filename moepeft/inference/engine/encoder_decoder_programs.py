# SPDX-License-Identifier: Apache-2.0
"""The programs of an encoder-decoder: encode and attach inputs, decode a token
of their answers, and log-probabilities of given answers.

z is the number of adapter buckets. Inputs and answer have the same cache
length, that of the longer.
"""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.data.batching.seq2seq import PAD
from moepeft.inference.engine import kv_cache, sampler
from moepeft.inference.engine.compiled import Programs, int32
from moepeft.inference.engine.limits import EngineConfig, padded_size
from moepeft.inference.engine.per_layer import LayeredMethod, ServedModel


def plan(programs: Programs, model: ServedModel, config: EngineConfig) -> None:
  """Plans the programs `encode`, `attach`, `decode` and `score`."""
  d, dtype = model.module.config.d_model, model.module.dtype

  def states(n, length):
    return jax.ShapeDtypeStruct((n, length, d), dtype)

  def source(length):
    return (
      *(states(1, length), int32(1), int32(1, length), int32(1)),
      model.embeddings(1),
    )

  longest = config.cache_lens[-1]
  programs.plan_cache(attach(model, longest), longest, *source(longest))
  for s in config.input_lens:
    length = padded_size(config.cache_lens, s)
    method = encode(model, s, length)
    inputs = int32(1, s), int32(1), int32(1), model.embeddings(1)
    programs.plan_method(('encode', s), method, *inputs)
  for length in config.cache_lens:
    method = attach(model, length)
    programs.plan_method(('attach', length), method, *source(length))
    for n in config.batch_sizes:
      rows = int32(n, 1), *[int32(n)] * 3, model.embeddings(n)
      method = decode(model, n, length)
      programs.plan_method(('decode', n, 1, length), method, *rows)
    method = score(model, length)
    rows = int32(1, length), int32(1, length), *source(length)
    programs.plan_method(('score', length), method, *rows, on_demand=True)


def _encoder_context(
  size: Array,
  length: int,
  task: Array,
  fields: dict[str, Array],
  stack=None,
  ids: Array | None = None,
) -> Context:
  """The context of the encoder's ids [length], all of which are the prompt."""
  mask = (jnp.arange(length) < size)[None]
  return Context(
    token_mask=mask,
    prompt_mask=mask,
    task_ids=jnp.where(mask, task, 0),
    token_ids=None if ids is None else ids[None],
    run_layers=stack,
    **fields,
  )


def encode(model: ServedModel, s: int, length: int) -> LayeredMethod:
  """Encodes input ids.

  The inputs are ids, int32 [1, s]; the number of ids that are not padding,
  int32 [1]; the task, int32 [1]; and the inputs of routers
  (`ServedModel.fields`). The output is states [length, d].
  """

  def arguments(stack, ids, size, task, inputs):
    fields = model.fields(inputs)
    return ids[None], _encoder_context(size, s, task, fields, stack)

  def outputs(states, weights, *rows):
    return jnp.pad(states[0, 0], ((0, length - s), (0, 0)))

  return LayeredMethod(model, 'encode', 'encoder', arguments, outputs)


def attach(model: ServedModel, length: int) -> LayeredMethod:
  """Writes the cross-attention's keys and values to a slot.

  The inputs are encoder states [1, length, d], the number of them that are not
  padding, int32 [1], their ids, int32 [1, length], the task, int32 [1], and the
  inputs of routers. There is no output.
  """

  def arguments(stack, states, size, source_ids, task, inputs):
    fields = model.fields(inputs)
    ctx = Context(
      token_mask=jnp.ones((1, 1), bool),
      prompt_mask=jnp.ones((1, 1), bool),
      task_ids=task[None, None],
      **fields,
      index=jnp.int32(0),
      decode=True,
      cache_length=length,
      run_layers=stack,
    )
    ids = jnp.full((1, 1), PAD, jnp.int32)
    source_ctx = _encoder_context(size, length, task, fields, ids=source_ids)
    return ids, ctx, states[None], source_ctx

  def write_cache(cache, rows, positions, new):
    return kv_cache.write_cross(cache, rows, new)

  # The compiler removes the computation of the logits, which are unused.
  return LayeredMethod(
    model,
    'decode',
    'decoder',
    arguments,
    lambda *_: (),
    lambda *_: {},
    write_cache,
  )


def decode(model: ServedModel, n: int, length: int) -> LayeredMethod:
  """Computes the next token of n answers; see `decoder_programs.decode`.

  The inputs are each answer's last token, int32 [n, 1]; its position, the
  number of tokens of its row's inputs, and its task, int32 [n] each; and the
  inputs of routers.
  """

  def arguments(stack, ids, position, size, task, inputs):
    fields = model.fields(inputs)
    ctx = Context(
      token_mask=jnp.ones((1, 1), bool),
      # The decoder's prompt is its first input.
      prompt_mask=(position == 0)[None, None],
      task_ids=task[None, None],
      **fields,
      index=position,
      decode=True,
      cache_length=length,
      run_layers=stack,
    )
    # Unused: the cross-attention reads its keys and values from the cache.
    module = model.module
    encoded = jnp.zeros((1, length, module.config.d_model), module.dtype)
    source_ctx = _encoder_context(size, length, task, fields)
    return ids[None], ctx, encoded, source_ctx

  def outputs(logits, weights, *rows):
    return sampler.step_output(logits[:, 0].astype(jnp.float32), weights)

  def read_cache(cache, rows):
    return kv_cache.read_rows(cache, rows, n, length)

  def write_cache(cache, rows, positions, new):
    return kv_cache.write_rows(cache, rows, new, positions, 1)

  return LayeredMethod(
    model, 'decode', 'decoder', arguments, outputs, read_cache, write_cache
  )


def score(model: ServedModel, length: int) -> LayeredMethod:
  """Computes the log-probabilities of a given answer, without a cache.

  The inputs are the decoder's inputs and the tokens after them, int32
  [1, length] each, then the inputs of `attach`. The output is float32 [length].
  """

  def arguments(stack, ids, next_ids, states, size, source_ids, task, inputs):
    fields = model.fields(inputs)
    # Attention is causal, so the padding after the answer needs no mask.
    ctx = Context(
      token_mask=jnp.ones((1, length), bool),
      prompt_mask=(jnp.arange(length) == 0)[None],
      task_ids=jnp.full((1, length), task),
      **fields,
      run_layers=stack,
    )
    source_ctx = _encoder_context(size, length, task, fields, ids=source_ids)
    return ids[None], ctx, states[None], source_ctx

  def outputs(logits, weights, ids, next_ids, *source):
    logits = logits[0, 0].astype(jnp.float32)
    return sampler.score(logits, next_ids[0])

  return LayeredMethod(model, 'decode', 'decoder', arguments, outputs)
