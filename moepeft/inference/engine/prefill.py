# SPDX-License-Identifier: Apache-2.0
"""Prefill: a decoder's prompt in chunks, an encoder-decoder's inputs at once.

After the prefill, a decode step computes the answer's first token. A decoder's
prefill therefore leaves out the last token of the prompt, which is the input of
that step. The two classes have the same methods.
"""

import collections

import jax
import numpy as np

from moepeft.core.types import Array
from moepeft.data.batching.seq2seq import PAD
from moepeft.inference.api import PromptLogprobs, TokenLogprob
from moepeft.inference.engine.limits import padded_size
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.prefix_cache import PrefixCache
from moepeft.inference.engine.sampler import site_experts, top_logprobs
from moepeft.inference.engine.sequence import Sequence


class DecoderPrefill:
  """Prefill of a decoder-only model."""

  def __init__(self, runner: ModelRunner, slots: PrefixCache):
    self._runner, self._slots = runner, slots

  @property
  def batch_size(self) -> int:
    """The largest number of prompts in one call of `read_chunk`."""
    return self._runner.config.prefill_batch_sizes[-1]

  def assign_slot(self, sequence: Sequence) -> None:
    """Gives a slot to a sequence that has its adapter already."""
    ids, adapter = sequence.ids, sequence.adapter
    # Cached tokens have no logits, so a scored prompt is computed again. One
    # that a router reads as a whole is computed as a whole.
    scored = sequence.request.prompt_logprobs is not None
    reusable = () if scored or adapter.reads_prompt else ids[:-1]
    assignment = self._slots.take(reusable, sequence.cache_key)
    slot = sequence.slot = assignment.slot
    sequence.num_cached_tokens = max(
      0, len(slot.ids) - len(adapter.soft_prompt_ids)
    )
    vocab = self._runner.model.config.vocab
    sequence.track_previous(sequence.request.prompt_ids, vocab)
    if assignment.source is not None:
      self._runner.copy(assignment.source.number, slot.number)
    if not adapter.reads_prompt:
      self._update_prefilled(sequence)

  def read_chunk(self, batch: list[Sequence]) -> None:
    """Reads a chunk of each prompt; sets `prefilled` after the last chunk.

    A prompt that a router reads is one chunk, with its last token: a token's
    routing depends on all of them. If the first sequence has such a prompt, the
    others wait.
    """
    runner = self._runner
    whole = batch[0].adapter.reads_prompt
    batch = [s for s in batch if s.adapter.reads_prompt == whole]
    starts = [len(sequence.slot.ids) for sequence in batch]
    remaining = [
      len(sequence.ids) - (not whole) - start
      for sequence, start in zip(batch, starts, strict=True)
    ]
    t = (
      padded_size(runner.whole_prompt_lens, max(remaining))
      if whole
      else self._chunk(max(remaining), max(starts))
    )
    counts = [min(t, count) for count in remaining]
    chunks = [
      sequence.ids[start : start + count]
      for sequence, start, count in zip(batch, starts, counts, strict=True)
    ]
    n = padded_size(runner.config.prefill_batch_sizes, len(batch))
    adapters = _pad_rows([sequence.adapter.row for sequence in batch], n)
    states, experts = runner.prefill(
      padded_size(runner.cache_lens, max(starts) + t),
      adapters,
      _pad_rows([sequence.slot.number for sequence in batch], n),
      _pad_rows([_pad_ids(chunk, t) for chunk in chunks], n),
      _pad_rows(starts, n),
      _pad_rows(counts, n),
      _pad_rows([sequence.prompt_size for sequence in batch], n),
      _pad_rows([sequence.task_id for sequence in batch], n),
      runner.router_inputs(_pad(batch, n)),
    )
    if any(s.request.prompt_logprobs is not None for s in batch):
      self._score_chunk(batch, adapters, states, experts, starts, counts)
    for sequence, chunk in zip(batch, chunks, strict=True):
      # The last token is the first decode step's input, which caches it again.
      sequence.slot.ids.extend(chunk[:-1] if whole else chunk)
      self._update_prefilled(sequence)

  def cache_len(self, sequence: Sequence) -> int:
    """The number of cache entries that the next decode step needs."""
    return len(sequence.ids) + len(sequence.answer)

  def decode_inputs(
    self, batch: list[Sequence], proposals: list[tuple[int, ...]], t: int
  ) -> tuple[np.ndarray, ...]:
    """The decode step's ids, int32 [n, t], the positions of the first, the
    numbers of ids without padding, and the tasks, int32 [n] each, and the
    inputs of routers."""
    ids = [
      _pad_ids(((sequence.answer or sequence.ids)[-1], *proposed), t)
      for sequence, proposed in zip(batch, proposals, strict=True)
    ]
    positions = [self.cache_len(sequence) - 1 for sequence in batch]
    counts = [1 + len(proposed) for proposed in proposals]
    tasks = [sequence.task_id for sequence in batch]
    return (
      *(np.array(a, np.int32) for a in (ids, positions, counts, tasks)),
      self._runner.router_inputs(batch),
    )

  def record_cached_token(self, sequence: Sequence) -> None:
    """Records that a decode step has cached a sequence's last token."""
    sequence.slot.ids.append((sequence.answer or sequence.ids)[-1])

  def _chunk(self, remaining: int, start: int) -> int:
    """The length of the next chunk.

    It is the smallest that holds the remaining tokens, if at most a quarter of
    it is padding; otherwise the largest without padding.
    """
    longest = self._runner.cache_lens[-1]
    sizes = [t for t in self._runner.config.chunks if start + t <= longest]
    for t in sizes:
      if t >= remaining and (t == sizes[0] or 4 * remaining >= 3 * t):
        return t
    return max([t for t in sizes if t <= remaining], default=sizes[0])

  def _update_prefilled(self, sequence: Sequence) -> None:
    sequence.prefilled = len(sequence.slot.ids) == len(sequence.ids) - 1
    if sequence.prefilled and sequence.request.prompt_logprobs is not None:
      first = TokenLogprob(sequence.request.prompt_ids[0])
      sequence.emit(PromptLogprobs((first, *sequence.prompt_logprobs)))

  def _score_chunk(
    self, batch, adapters, states, experts, starts, counts
  ) -> None:
    """Records the log-probability of the token after each token of a chunk.

    A soft prompt's tokens and the prompt's first token are not scored.
    """
    n, t, _ = states.shape
    next_ids = []
    for sequence, start, count in zip(batch, starts, counts, strict=True):
      soft_prompt = len(sequence.adapter.soft_prompt_ids)
      following = sequence.ids[start + 1 : start + 1 + count]
      next_ids.append(
        [
          token if start + 1 + i > soft_prompt else PAD
          for i, token in enumerate(following)
        ]
      )
    args = (
      adapters,
      states,
      _pad_rows([_pad_ids(ids, t) for ids in next_ids], n),
      _pad_rows([sequence.task_id for sequence in batch], n),
      self._runner.router_inputs(_pad(batch, n)),
    )
    routing = any(sequence.request.routing for sequence in batch)
    logprobs, top_ids, top_values, experts = jax.device_get(
      (*self._runner.score_prompts(*args), experts if routing else {})
    )
    for row, sequence in enumerate(batch):
      count = sequence.request.prompt_logprobs
      if count is None:
        continue
      if not np.isfinite(logprobs[row, : len(next_ids[row])]).all():
        raise ArithmeticError(
          "the prompt's log-probabilities are NaN or infinite"
        )
      row_experts = {path: weights[row] for path, weights in experts.items()}
      soft_prompt = len(sequence.adapter.soft_prompt_ids)
      for i, token in enumerate(next_ids[row]):
        if starts[row] + 1 + i <= soft_prompt:
          continue
        sequence.prompt_logprobs.append(
          TokenLogprob(
            token,
            float(logprobs[row, i]),
            top_logprobs(top_ids[row, i], top_values[row, i], count),
            site_experts(row_experts, i, sequence),
          )
        )


class EncoderDecoderPrefill:
  """Prefill of an encoder-decoder.

  Encoder states are cached by the adapter's hash, the task and the input ids.
  """

  batch_size = 1

  def __init__(self, runner: ModelRunner, slots: PrefixCache):
    self._runner, self._slots = runner, slots
    # In order of use, the least recently used first.
    self._encoder_states: collections.OrderedDict[tuple, Array] = (
      collections.OrderedDict()
    )

  def assign_slot(self, sequence: Sequence) -> None:
    sequence.slot = self._slots.take((), sequence.cache_key).slot
    sequence.track_previous((PAD,), self._runner.model.config.vocab)

  def read_chunk(self, batch: list[Sequence]) -> None:
    (sequence,) = batch
    ids = sequence.ids
    if (sequence.cache_key, ids) in self._encoder_states:
      sequence.num_cached_tokens = len(sequence.request.prompt_ids)
    self._runner.attach(
      sequence.adapter.row,
      sequence.slot.number,
      self.encode(sequence),
      ids,
      sequence.task_id,
      self._runner.router_inputs([sequence]),
    )
    sequence.prefilled = True

  def cache_len(self, sequence: Sequence) -> int:
    return max(len(sequence.ids), len(sequence.answer) + 1)

  def decode_inputs(
    self, batch: list[Sequence], proposals: list[tuple[int, ...]], t: int
  ) -> tuple[np.ndarray, ...]:
    """As that of `DecoderPrefill`, with the sizes of the inputs as counts;
    nothing is proposed."""
    ids = [[s.answer[-1] if s.answer else PAD] for s in batch]
    positions = [len(sequence.answer) for sequence in batch]
    sizes = [len(sequence.ids) for sequence in batch]
    tasks = [sequence.task_id for sequence in batch]
    columns = ids, positions, sizes, tasks
    return (
      *(np.array(column, np.int32) for column in columns),
      self._runner.router_inputs(batch),
    )

  def record_cached_token(self, sequence: Sequence) -> None:
    pass

  def encode(self, sequence: Sequence) -> Array:
    """The encoder states [length, d] of inputs, from the cache if possible."""
    adapter, ids = sequence.adapter.row, sequence.ids
    key = sequence.cache_key, ids
    if key in self._encoder_states:
      self._encoder_states.move_to_end(key)
      return self._encoder_states[key]
    s = padded_size(self._runner.config.input_lens, len(ids))
    states = self._runner.encode(
      *(s, adapter, _pad_ids(ids, s), len(ids), sequence.task_id),
      self._runner.router_inputs([sequence]),
    )
    self._encoder_states[key] = states
    size = sum(a.nbytes for a in self._encoder_states.values())
    while self._encoder_states and size > self._runner.config.encoder_bytes:
      size -= self._encoder_states.popitem(last=False)[1].nbytes
    return states

  def clear_cache(self) -> None:
    """Drops all cached encoder states."""
    self._encoder_states.clear()


def _pad_ids(ids, t: int) -> np.ndarray:
  """Pads ids with zeros to int32 [t]."""
  padded = np.zeros(t, np.int32)
  padded[: len(ids)] = ids
  return padded


def _pad_rows(rows: list, n: int) -> np.ndarray:
  """Stacks rows to int32 [n, ...]; padding rows repeat the first."""
  return np.stack(_pad(rows, n)).astype(np.int32)


def _pad(rows: list, n: int) -> list:
  return [*rows, *[rows[0]] * (n - len(rows))]
