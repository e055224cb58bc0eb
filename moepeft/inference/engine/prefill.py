# SPDX-License-Identifier: Apache-2.0
"""Prefill: a decoder's prompt in chunks, an encoder-decoder's inputs at once.

Both leave the slot so that the next step gives the answer's first token: a
decoder's prompt is read up to its last token, which the step takes. The two
classes have the same methods; the scheduler has one of them.
"""

import collections

import jax
import numpy as np

from moepeft.core.types import Array
from moepeft.data.batching.seq2seq import PAD
from moepeft.inference.api import PromptLogprobs, TokenLogprob
from moepeft.inference.engine.limits import at_least
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
    """The number of prompts that `read` takes at once."""
    return self._runner.config.prefill_batch_sizes[-1]

  def begin(self, sequence: Sequence) -> None:
    """Gives a slot to a sequence that has its adapter."""
    ids, adapter = sequence.ids, sequence.adapter
    # What is scored must be computed.
    reusable = ids[:-1] if sequence.request.prompt_logprobs is None else ()
    assignment = self._slots.take(reusable, adapter.sha256)
    slot = sequence.slot = assignment.slot
    sequence.cached = max(0, len(slot.ids) - len(adapter.soft_prompt_ids))
    vocab = self._runner.model.config.vocab
    sequence.track_previous(sequence.request.prompt_ids, vocab)
    if assignment.source is not None:
      self._runner.copy(assignment.source.number, slot.number)
    self._check_prefilled(sequence)

  def read(self, batch: list[Sequence]) -> None:
    """Reads a chunk of each prompt; sets `prefilled` after its last."""
    runner = self._runner
    starts = [len(sequence.slot.ids) for sequence in batch]
    left = [
      len(sequence.ids) - 1 - start
      for sequence, start in zip(batch, starts, strict=True)
    ]
    t = self._chunk(max(left), max(starts))
    counts = [min(t, count) for count in left]
    chunks = [
      sequence.ids[start : start + count]
      for sequence, start, count in zip(batch, starts, counts, strict=True)
    ]
    n = at_least(runner.config.prefill_batch_sizes, len(batch))
    adapters = _rows([sequence.adapter.row for sequence in batch], n)
    states, experts = runner.prefill(
      at_least(runner.cache_lens, max(starts) + t),
      adapters,
      _rows([sequence.slot.number for sequence in batch], n),
      _rows([_padded(chunk, t) for chunk in chunks], n),
      _rows(starts, n),
      _rows(counts, n),
    )
    if any(s.request.prompt_logprobs is not None for s in batch):
      self._score(batch, adapters, states, experts, starts, counts)
    for sequence, chunk in zip(batch, chunks, strict=True):
      sequence.slot.ids.extend(chunk)
      self._check_prefilled(sequence)

  def cache_len(self, sequence: Sequence) -> int:
    """The length of the cache that the next step needs."""
    return len(sequence.ids) + len(sequence.answer)

  def inputs(self, batch: list[Sequence]) -> tuple[np.ndarray, ...]:
    """The arguments of a step beside adapters and slots: int32 [n] each."""
    tokens = [(sequence.answer or sequence.ids)[-1] for sequence in batch]
    positions = [self.cache_len(sequence) - 1 for sequence in batch]
    return np.array(tokens, np.int32), np.array(positions, np.int32)

  def record_step(self, sequence: Sequence) -> None:
    """Notes that a step has read the token of `inputs`."""
    sequence.slot.ids.append((sequence.answer or sequence.ids)[-1])

  def _chunk(self, left: int, start: int) -> int:
    """A chunk's length: all that is left with little padding, or less."""
    longest = self._runner.cache_lens[-1]
    sizes = [t for t in self._runner.config.chunks if start + t <= longest]
    for t in sizes:
      if t >= left and (t == sizes[0] or 4 * left >= 3 * t):
        return t
    return max([t for t in sizes if t <= left], default=sizes[0])

  def _check_prefilled(self, sequence: Sequence) -> None:
    sequence.prefilled = len(sequence.slot.ids) == len(sequence.ids) - 1
    if sequence.prefilled and sequence.request.prompt_logprobs is not None:
      first = TokenLogprob(sequence.request.prompt_ids[0])
      sequence.emit(PromptLogprobs((first, *sequence.prompt_logprobs)))

  def _score(self, batch, adapters, states, experts, starts, counts) -> None:
    """Notes the log-probabilities of the tokens that follow each chunk's.

    Tokens of a soft prompt have none, and the first of the prompt has none, as
    if nothing stood before it.
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
    args = adapters, states, _rows([_padded(ids, t) for ids in next_ids], n)
    routing = any(sequence.request.routing for sequence in batch)
    logprobs, ids, best, experts = jax.device_get(
      (*self._runner.score_prompts(*args), experts if routing else {})
    )
    for row, sequence in enumerate(batch):
      count = sequence.request.prompt_logprobs
      if count is None:
        continue
      if not np.isfinite(logprobs[row, : len(next_ids[row])]).all():
        raise ArithmeticError("the prompt's log-probabilities are no numbers")
      row_experts = {path: weights[row] for path, weights in experts.items()}
      soft_prompt = len(sequence.adapter.soft_prompt_ids)
      for i, token in enumerate(next_ids[row]):
        if starts[row] + 1 + i <= soft_prompt:
          continue
        sequence.prompt_logprobs.append(
          TokenLogprob(
            token,
            float(logprobs[row, i]),
            top_logprobs(ids[row, i], best[row, i], count),
            site_experts(row_experts, i, sequence),
          )
        )


class EncoderDecoderPrefill:
  """Prefill of an encoder-decoder.

  Encoded inputs are kept, by the adapter's hash and the inputs.
  """

  batch_size = 1

  def __init__(self, runner: ModelRunner, slots: PrefixCache):
    self._runner, self._slots = runner, slots
    # The one used longest ago first.
    self._encoded: collections.OrderedDict[tuple, Array] = (
      collections.OrderedDict()
    )

  def begin(self, sequence: Sequence) -> None:
    sequence.slot = self._slots.take((), sequence.adapter.sha256).slot
    sequence.track_previous((PAD,), self._runner.model.config.vocab)

  def read(self, batch: list[Sequence]) -> None:
    (sequence,) = batch
    sha256, ids = sequence.adapter.sha256, sequence.ids
    if (sha256, ids) in self._encoded:
      sequence.cached = len(sequence.request.prompt_ids)
    states = self.encode(sha256, sequence.adapter.row, ids)
    slot = sequence.slot.number
    self._runner.attach(sequence.adapter.row, slot, states, len(ids))
    sequence.prefilled = True

  def cache_len(self, sequence: Sequence) -> int:
    return max(len(sequence.ids), len(sequence.answer) + 1)

  def inputs(self, batch: list[Sequence]) -> tuple[np.ndarray, ...]:
    tokens = [s.answer[-1] if s.answer else PAD for s in batch]
    positions = [len(sequence.answer) for sequence in batch]
    sizes = [len(sequence.ids) for sequence in batch]
    return tuple(np.array(a, np.int32) for a in (tokens, positions, sizes))

  def record_step(self, sequence: Sequence) -> None:
    pass

  def encode(
    self, sha256: str, adapter: np.ndarray, ids: tuple[int, ...]
  ) -> Array:
    """States [length, d] of inputs; computed once while they are kept.

    Args:
      sha256: the adapter's.
      adapter: int32 [z].
    """
    key = sha256, ids
    if key in self._encoded:
      self._encoded.move_to_end(key)
      return self._encoded[key]
    s = at_least(self._runner.config.input_lens, len(ids))
    states = self._runner.encode(s, adapter, _padded(ids, s), len(ids))
    self._encoded[key] = states
    size = sum(states.nbytes for states in self._encoded.values())
    while self._encoded and size > self._runner.config.encoder_bytes:
      size -= self._encoded.popitem(last=False)[1].nbytes
    return states

  def forget(self) -> None:
    """Drops all encoded inputs."""
    self._encoded.clear()


def _padded(ids, t: int) -> np.ndarray:
  """int32 [t]."""
  padded = np.zeros(t, np.int32)
  padded[: len(ids)] = ids
  return padded


def _rows(rows: list, n: int) -> np.ndarray:
  """int32 [n, ...]; a row that no sequence has computes the first again."""
  return np.stack([*rows, *[rows[0]] * (n - len(rows))]).astype(np.int32)
