# SPDX-License-Identifier: Apache-2.0
"""The model runner: calls an engine's compiled programs.

Only the engine thread uses it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moepeft.core.types import Array, Tree
from moepeft.data.batching.router_inputs import embedding_size
from moepeft.inference.adapters.served_modules import (
  reads_prompt,
)
from moepeft.inference.engine import (
  decoder_programs,
  encoder_decoder_programs,
  kv_cache,
  sampler,
)
from moepeft.inference.engine.compiled import Key, Programs
from moepeft.inference.engine.limits import EngineConfig
from moepeft.inference.engine.per_layer import ServedModel
from moepeft.inference.engine.sampler import StepOutput
from moepeft.inference.engine.weights import Adapters, LayeredWeights


class ModelRunner:
  """A model with its adapters, compiled programs and KV cache.

  The methods have the names of the programs. n is the number of rows, z the
  number of adapter buckets. A task is its index in the adapter's list, from 1;
  0 for none. `router_inputs` are those of the method of this name.

  Attributes:
    two_pass: whether a first pass of the base precedes each call.
    reads_prompt: whether a router reads the whole prompt.
    embedding_size: the size of the embeddings that mixtures read; 0 for none.
    cache_lens: the lengths of the cache that programs read.
    whole_prompt_lens: the lengths of prompts that are read in one chunk.
  """

  def __init__(
    self,
    model: Any,
    params: Tree,
    adapters: Adapters,
    config: EngineConfig,
    device: Any = None,
  ):
    self.model = model.clone(adapter_map=adapters.adapter_map)
    self.config, self.adapters = config, adapters
    self.two_pass = self.model.adapter_map.two_pass
    self.reads_prompt = any(
      reads_prompt(adapter) for _, adapter in adapters.adapter_map.entries
    )
    self.embedding_size = embedding_size(adapters.adapter_map)
    scan = config.scan
    if scan is None:
      scan = jax.default_backend() != 'cpu'
    self.weights = LayeredWeights(params, adapters, scan, device)
    self.programs = Programs(self.weights, config.slots, config.compile_ahead)
    served = ServedModel(
      self.model,
      adapters.row_tree,
      config.routing,
      self.reads_prompt,
      self.embedding_size,
    )
    decoder_only = hasattr(model, 'extend')
    if config.num_proposed_tokens and not decoder_only:
      raise ValueError(
        'tokens are proposed to decoder-only models; leave out '
        'prompt_lookup_num_tokens and num_assistant_tokens'
      )
    self.cache_lens, self.whole_prompt_lens = config.cache_lens, ()
    if decoder_only:
      self.cache_lens = decoder_programs.cache_lens(config)
      self.whole_prompt_lens = decoder_programs.whole_prompt_lens(config)
    plan = (
      decoder_programs.plan if decoder_only else encoder_decoder_programs.plan
    )
    plan(self.programs, served, config)
    sampler.plan(self.programs, model.config.vocab)
    self._cache: Any = None

  def compile(self, progress: Callable[[str, int, int], None]) -> None:
    """Compiles the programs, and allocates the cache.

    Args:
      progress: see `Programs.compile`.
    """
    self.programs.compile(progress)
    self.reset_cache()

  def reset_cache(self) -> None:
    """Allocates an empty cache, at the start or after a failed step."""
    self._cache = None
    self._cache = kv_cache.zeros(self.programs.cache)

  @property
  def cache_intact(self) -> bool:
    """Whether the cache is usable: a failed step deletes the donated arrays."""
    return not any(a.is_deleted() for a in jax.tree.leaves(self._cache))

  def router_inputs(self, batch: Sequence[Any]) -> dict[str, np.ndarray]:
    """The inputs of routers from the requests of sequences, [n, ...] each."""
    if not self.embedding_size:
      return {}
    embeddings = np.zeros((len(batch), self.embedding_size), np.float32)
    for row, sequence in zip(embeddings, batch, strict=True):
      if sequence.adapter.embedding_size:
        row[:] = sequence.request.embedding
    return {'embeddings': embeddings}

  def decode(
    self, n: int, length: int, adapters: np.ndarray, slots: np.ndarray, *inputs
  ) -> StepOutput:
    """Computes the next token of n rows, and those after proposed tokens.

    Args:
      length: the number of cache entries that are read.
      adapters: int32 [n, z], each row's slot in each bucket.
      slots: int32 [n].
      inputs: [n, ...] each, from `DecoderPrefill.decode_inputs`.
    """
    ids, positions = inputs[:2]
    if self.two_pass:
      _, _, counts, tasks, router_inputs = inputs
      prompts = ids, positions, counts, np.zeros(n, np.int32), tasks
      router_inputs = self._with_first_pass(
        length, adapters, slots, *prompts, router_inputs
      )
      inputs = *inputs[:-1], router_inputs
    key = 'decode', *ids.shape, length
    return self._run(key, adapters, slots, positions, *inputs)

  def prefill(
    self,
    length: int,
    adapters: np.ndarray,
    slots: np.ndarray,
    ids: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    prompt_sizes: np.ndarray,
    tasks: np.ndarray,
    router_inputs: dict[str, np.ndarray],
  ) -> tuple[Array, Tree]:
    """Reads a chunk of n prompts.

    Args:
      length: the number of cache entries that are read.
      adapters: int32 [n, z], each row's slot in each bucket.
      slots: int32 [n].
      ids: int32 [n, t].
      starts: int32 [n], the position of each row's first id.
      counts: int32 [n], the number of ids of each row that are not padding.
      prompt_sizes: int32 [n], the number of tokens of each row's prompt.
      tasks: int32 [n].

    Returns:
      States [n, t, d], and {path: experts' weights [n, t, e]}.
    """
    prompts = ids, starts, counts, prompt_sizes, tasks
    if self.two_pass:
      router_inputs = self._with_first_pass(
        length, adapters, slots, *prompts, router_inputs
      )
    key = 'prefill', *ids.shape, length
    return self._run(key, adapters, slots, starts, *prompts, router_inputs)

  def _with_first_pass(
    self, length, adapters, slots, ids, starts, *inputs
  ) -> dict[str, Array]:
    """The inputs of routers, with the states [n, t, d] of the base alone."""
    key = 'first_pass', *ids.shape, length
    states, _ = self._run(key, adapters, slots, starts, ids, starts, *inputs)
    return {'first_pass': states} | inputs[-1]

  def encode(
    self,
    s: int,
    adapters: np.ndarray,
    ids: np.ndarray,
    size: int,
    task: int,
    router_inputs: dict[str, np.ndarray],
  ) -> Array:
    """Encodes input ids to states [length, d].

    Args:
      s: the length of `ids`.
      adapters: int32 [z].
      ids: int32 [s].
      size: the number of ids that are not padding.
    """
    zero = np.zeros(1, np.int32)
    size, task = np.array([[size], [task]], np.int32)
    args = adapters[None], zero, zero, ids[None], size, task, router_inputs
    return self._run(('encode', s), *args)

  def attach(
    self,
    adapters: np.ndarray,
    slot: int,
    states: Array,
    source_ids: Sequence[int],
    task: int,
    router_inputs: dict[str, np.ndarray],
  ) -> None:
    """Writes the cross-attention's keys and values to a slot.

    Args:
      adapters: int32 [z].
      states: [length, d], from `encode`.
      source_ids: the ids of the states that are not padding.
    """
    slot, start = np.array([slot], np.int32), np.zeros(1, np.int32)
    source = _source(states, source_ids, task)
    args = adapters[None], slot, start, *source, router_inputs
    self._run(('attach', len(states)), *args)

  def score_prompts(
    self,
    adapters: np.ndarray,
    states: Array,
    next_ids: np.ndarray,
    tasks: np.ndarray,
    router_inputs: dict[str, np.ndarray],
  ) -> tuple[Array, ...]:
    """See `decoder_programs.score`."""
    w = self.weights
    program = self.programs[('score', *next_ids.shape)]
    args = adapters, states, next_ids, tasks, router_inputs
    return program(w.params, w.adapter_params, *args)

  def score_answer(
    self,
    adapters: np.ndarray,
    ids: np.ndarray,
    next_ids: np.ndarray,
    states: Array,
    source_ids: Sequence[int],
    task: int,
    router_inputs: dict[str, np.ndarray],
  ) -> Array:
    """See `encoder_decoder_programs.score` and `attach`."""
    zero = np.zeros(1, np.int32)
    source = _source(states, source_ids, task)
    args = ids[None], next_ids[None], *source, router_inputs
    key = 'score', len(states)
    return self._run(key, adapters[None], zero, zero, *args)

  def copy(self, source: int, target: int) -> None:
    """Copies a slot's keys and values to another slot."""
    program = self.programs[('copy',)]
    self._cache = program(self._cache, np.int32(source), np.int32(target))

  def clear_slot(self, slot: int) -> None:
    """Writes zeros to a slot's keys and values."""
    self._cache = self.programs[('clear',)](self._cache, np.int32(slot))

  def _run(self, key: Key, adapters, slots, positions, *inputs) -> Any:
    """Runs a method of the model, and returns its outputs."""
    method, w = self.programs.methods[key], self.weights
    writes_cache = method.write_cache is not None
    layers, layer_adapters = (
      w.layers[method.side],
      w.layer_adapters(method.side),
    )
    if w.scan:
      cache = self._cache if writes_cache else {}
      cache, outputs = self.programs[key](
        *(w.params, layers, w.adapter_params, layer_adapters, cache),
        *(adapters, slots, positions, *inputs),
      )
      if writes_cache:
        self._cache = cache
      return outputs
    shared = w.params, w.adapter_params, adapters
    x, layer_args = self.programs[(*key, 'before')](*shared, *inputs)
    weights, program = [], self.programs[(*key, 'layer')]
    for i, layer in enumerate(layers):
      cache = self._cache[i] if writes_cache else {}
      rows = adapters, slots, positions, np.int32(i)
      x, cache, layer_weights = program(
        layer, layer_adapters, cache, *rows, x, layer_args
      )
      weights.append(layer_weights)
      if writes_cache:
        self._cache[i] = cache
    return self.programs[(*key, 'after')](*shared, x, weights, *inputs)


def _source(states: Array, ids: Sequence[int], task: int) -> tuple[Array, ...]:
  """The encoder's states, the number of its ids, these with padding, a task."""
  padded = np.zeros((1, len(states)), np.int32)
  padded[0, : len(ids)] = ids
  size, task = np.array([[len(ids)], [task]], np.int32)
  return states[None], size, padded, task
