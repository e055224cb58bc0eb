# SPDX-License-Identifier: Apache-2.0
"""The programs of an encoder-decoder: encode and attach inputs, decode a token
of their answers, and log-probabilities of given answers.

z is the number of buckets that adapters have. Inputs and answer have the same
cache length: that of the longer.
"""

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.data.batching.seq2seq import PAD
from moepeft.inference.engine import kv_cache, sampler
from moepeft.inference.engine.compiled import Programs, ints
from moepeft.inference.engine.limits import EngineConfig, at_least
from moepeft.inference.engine.per_layer import LayeredMethod, ServedModel


def plan(programs: Programs, model: ServedModel, config: EngineConfig) -> None:
  """Plans `encode`, `attach`, `decode` and `score`, the functions of these
  names."""
  d, dtype = model.module.config.d_model, model.module.dtype

  def states(n, length):
    return jax.ShapeDtypeStruct((n, length, d), dtype)

  longest = config.cache_lens[-1]
  programs.plan_cache(
    attach(model, longest), longest, states(1, longest), ints(1)
  )
  for s in config.input_lens:
    length = at_least(config.cache_lens, s)
    method = encode(model, s, length)
    programs.plan_method(('encode', s), method, ints(1, s), ints(1))
  for length in config.cache_lens:
    method = attach(model, length)
    programs.plan_method(('attach', length), method, states(1, length), ints(1))
    for n in config.batch_sizes:
      method, rows = decode(model, n, length), (ints(n), ints(n), ints(n))
      programs.plan_method(('decode', n, length), method, *rows)
    method = score(model, length)
    rows = ints(1, length), ints(1, length), states(1, length), ints(1)
    programs.plan_method(('score', length), method, *rows, on_demand=True)


def _source(size: Array, length: int, stack=None) -> Context:
  mask = (jnp.arange(length) < size)[None]
  return Context(token_mask=mask, run_layers=stack)


def encode(model: ServedModel, s: int, length: int) -> LayeredMethod:
  """Reads inputs, int32 [1, s], of which `size` are real, int32 [1]: gives
  states [length, d]."""

  def arguments(stack, ids, size):
    return ids[None], _source(size, s, stack)

  def outputs(states, weights, *rows):
    return jnp.pad(states[0, 0], ((0, length - s), (0, 0)))

  return LayeredMethod(model, 'encode', 'encoder', arguments, outputs)


def attach(model: ServedModel, length: int) -> LayeredMethod:
  """Writes keys and values of encoded inputs [1, length, d], of a size int32
  [1], to a slot; gives nothing."""

  def arguments(stack, states, size):
    ctx = Context(
      token_mask=jnp.ones((1, 1), bool),
      index=jnp.int32(0),
      decode=True,
      cache_length=length,
      run_layers=stack,
    )
    ids = jnp.full((1, 1), PAD, jnp.int32)
    return ids, ctx, states[None], _source(size, length)

  def put(cache, rows, positions, new):
    return kv_cache.put_cross(cache, rows, new)

  # The logits of the decoder's first token are left out by the compiler.
  return LayeredMethod(
    model, 'decode', 'decoder', arguments, lambda *_: (), lambda *_: {}, put
  )


def decode(model: ServedModel, n: int, length: int) -> LayeredMethod:
  """As `decoder_programs.decode`.

  Takes one more, int32 [n]: the number of tokens of each row's inputs.
  """

  def arguments(stack, token, position, size):
    ctx = Context(
      token_mask=jnp.ones((1, 1), bool),
      index=position,
      decode=True,
      cache_length=length,
      run_layers=stack,
    )
    # Its keys and values are in the cache: it is not read.
    module = model.module
    encoded = jnp.zeros((1, length, module.config.d_model), module.dtype)
    return token[None, None], ctx, encoded, _source(size, length)

  def outputs(logits, weights, *rows):
    logits = logits[:, 0, 0].astype(jnp.float32)
    return sampler.step_output(
      logits, {path: a[:, 0] for path, a in weights.items()}
    )

  def cut(cache, rows):
    return kv_cache.cut(cache, rows, n, length)

  def put(cache, rows, positions, new):
    return kv_cache.put(cache, rows, new, positions, 1)

  return LayeredMethod(model, 'decode', 'decoder', arguments, outputs, cut, put)


def score(model: ServedModel, length: int) -> LayeredMethod:
  """Log-probabilities of a given answer, without a cache.

  Takes the decoder's inputs and the tokens that follow them, int32 [1, length]
  each, and the encoded inputs as `attach`; gives float32 [length].
  """

  def arguments(stack, ids, next_ids, states, size):
    # What comes after a token does not reach it, so padding needs no mask.
    ctx = Context(token_mask=jnp.ones((1, length), bool), run_layers=stack)
    return ids[None], ctx, states[None], _source(size, length)

  def outputs(logits, weights, ids, next_ids, states, size):
    raw = logits[0, 0].astype(jnp.float32)
    return sampler.score(raw, next_ids[0])

  return LayeredMethod(model, 'decode', 'decoder', arguments, outputs)
