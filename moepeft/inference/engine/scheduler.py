# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: the policy of who runs, what is computed next, and how
each sequence ends.

For the engine's thread alone.
"""

import collections
import time
from collections.abc import Callable

from moepeft.inference.api import (
  CANCELLED,
  FAILED,
  LENGTH,
  STOP,
  TIME,
  EngineFull,
  Finished,
  RequestRefused,
  Token,
  TokenLogprob,
)
from moepeft.inference.engine import sampler
from moepeft.inference.engine.decode_step import decode_step
from moepeft.inference.engine.fair_queue import FairQueue
from moepeft.inference.engine.limits import check_request_length
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.prefill import (
  DecoderPrefill,
  EncoderDecoderPrefill,
)
from moepeft.inference.engine.prefix_cache import PrefixCache
from moepeft.inference.engine.sequence import Sequence

# So many computations that fail one after the other are no request's fault.
_BROKEN = 4


class Scheduler:
  """The sequences that wait, and those that have slots.

  Attributes:
    runner: the model with its adapters.
    slots: the cache's rows.
    prefill: reads prompts.
    finished: number of requests by the reason of their end.
    prompt_tokens, cached_tokens, answer_tokens: totals of those.
    slot_seconds: moving average of the time for which a request has a slot.
    broken: why nothing can be computed any more; ''.
  """

  def __init__(
    self, runner: ModelRunner, on_finish: Callable[[Sequence], None]
  ):
    """
    Args:
      on_finish: called with each sequence after its last event.
    """
    self.runner, self._on_finish = runner, on_finish
    self.slots = PrefixCache(runner.config.slots)
    decoder_only = hasattr(runner.model, 'extend')
    prefill = DecoderPrefill if decoder_only else EncoderDecoderPrefill
    self.prefill = prefill(runner, self.slots)
    self._waiting: FairQueue[Sequence] = FairQueue()
    self._running: list[Sequence] = []
    self._failures = 0
    self.finished: collections.Counter[str] = collections.Counter()
    self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0
    self.slot_seconds = 1.0
    self.broken = ''

  @property
  def busy(self) -> bool:
    return bool(self._running or len(self._waiting))

  @property
  def free(self) -> int:
    """The number of slots that no sequence has."""
    return self.slots.free()

  def add_request(self, sequence: Sequence) -> None:
    self._waiting.put(sequence.request.client, sequence)

  def waits_for(self, adapter: str) -> bool:
    """Whether a request of an adapter has no slot yet."""
    return any(s.request.adapter == adapter for s in self._waiting)

  def step(self) -> None:
    """Ends what is cancelled or late, admits, prefills a chunk, and decodes."""
    now = time.monotonic()
    for sequence in [*self._waiting, *self._running]:
      if sequence.cancelled:
        self.finish(sequence, CANCELLED)
      elif sequence.timed_out(now):
        self.finish(sequence, TIME)
    self._admit()
    self._prefill()
    self._decode()

  def finish_all(self, reason: str, message: str = '') -> None:
    for sequence in [*self._waiting, *self._running]:
      self.finish(sequence, reason, message)

  def finish(self, sequence: Sequence, reason: str, message: str = '') -> None:
    """Frees a sequence's slot and adapter, and delivers its last event."""
    if sequence in self._running:
      self._running.remove(sequence)
      seconds = time.monotonic() - sequence.started
      self.slot_seconds += 0.1 * (seconds - self.slot_seconds)
    elif sequence in self._waiting:
      self._waiting.remove(sequence.request.client, sequence)
    if sequence.slot is not None:
      self._free_slot(sequence, reason)
    if sequence.adapter is not None:
      self.runner.adapters.release(sequence.adapter)
    event = Finished(
      reason,
      len(sequence.request.prompt_ids),
      sequence.cached,
      len(sequence.answer),
      message,
    )
    self.finished[reason] += 1
    self.prompt_tokens += event.prompt
    self.cached_tokens += event.cached
    self.answer_tokens += event.answer
    sequence.emit(event)
    self._on_finish(sequence)

  def invalidate(self) -> None:
    """Forgets all prefixes and encoded inputs: the weights have changed."""
    self.slots.invalidate()
    if isinstance(self.prefill, EncoderDecoderPrefill):
      self.prefill.forget()

  def _free_slot(self, sequence: Sequence, reason: str) -> None:
    """Clears a slot whose cache may contain NaN before it is reused."""
    slot = sequence.slot
    if reason == FAILED or not sequence.finite:
      slot.ids = []
      self._try(lambda: self.runner.clear(slot.number))
    self.slots.release(slot)

  def _admit(self) -> None:
    """Gives free slots to waiting sequences."""
    adapters, config = self.runner.adapters, self.runner.config
    put_off = []
    while len(self._waiting) and self.slots.free() and not self.broken:
      sequence = self._waiting.take()
      request = sequence.request
      try:
        sequence.use(adapters.acquire(request.adapter))
        # Another adapter may have its name by now.
        soft_prompt = len(sequence.adapter.soft_prompt_ids)
        check_request_length(request, self.runner.model, config, soft_prompt)
      except EngineFull:
        # Another's end frees an adapter slot; others do not wait for it.
        put_off.append(sequence)
        continue
      except Exception as e:
        self.finish(sequence, FAILED, _sentence(e))
        continue
      sequence.started = time.monotonic()
      self._running.append(sequence)
      self._guard([sequence], lambda s=sequence: self.prefill.begin(s))
    for sequence in reversed(put_off):
      self._waiting.put_back(sequence.request.client, sequence)

  def _prefill(self) -> None:
    """Reads a chunk of the prompts that came first."""
    batch = [s for s in self._running if not s.prefilled]
    batch = batch[: self.prefill.batch_size]
    if batch:
      self._guard(batch, lambda: self.prefill.read(batch))
    for sequence in [*self._running]:
      if sequence.prefilled and not sequence.request.max_new_tokens:
        sequence.finite = True
        self.finish(sequence, LENGTH)

  def _decode(self) -> None:
    """Adds a token to every sequence whose prompt is read."""
    batch = [s for s in self._running if s.prefilled]
    if not batch:
      return
    try:
      tokens = self._next_tokens(batch)
    except Exception as e:
      self._fail(batch, e)
      return
    self._failures = 0
    for sequence, token in zip(batch, tokens, strict=True):
      if isinstance(token, Exception):
        self.finish(sequence, FAILED, _sentence(token))
      else:
        self._guard([sequence], lambda s=sequence, t=token: self._append(s, t))

  def _next_tokens(
    self, batch: list[Sequence]
  ) -> list[TokenLogprob | Exception]:
    output = decode_step(self.runner, self.prefill, batch)
    return sampler.sample(self.runner.programs, batch, output)

  def _append(self, sequence: Sequence, token: TokenLogprob) -> None:
    """Delivers a token, and finishes the sequence if it was the last."""
    self.prefill.record_step(sequence)
    sequence.append(token.id)
    reason, request = '', sequence.request
    if token.id in request.eos_token_ids:
      reason = STOP
    elif request.constraint and request.constraint.accept(token.id):
      reason = STOP
    elif len(sequence.answer) >= request.max_new_tokens:
      reason = LENGTH
    sequence.emit(Token(token))
    if reason:
      self.finish(sequence, reason)

  def _guard(self, batch: list[Sequence], do: Callable[[], None]) -> None:
    """Does what only some sequences are part of."""
    try:
      do()
    except Exception as e:
      self._fail(batch, e)

  def _fail(self, batch: list[Sequence], error: Exception) -> None:
    """Ends the sequences of a failed computation; the others go on."""
    self._failures += not isinstance(error, ArithmeticError | ValueError)
    if not self.runner.cache_intact:
      # The failed program was writing to it.
      batch = [*self._running]
      self.slots.invalidate()
      self._try(self.runner.reset_cache)
    for sequence in batch:
      self.finish(sequence, FAILED, _sentence(error))
    if self._failures >= _BROKEN:
      self._give_up(error)

  def _try(self, do: Callable[[], None]) -> None:
    try:
      do()
    except Exception as e:
      self._give_up(e)

  def _give_up(self, error: Exception) -> None:
    self.broken = self.broken or (
      f'nothing can be computed any more: {_sentence(error)}; restart the '
      'server'
    )


def _sentence(error: Exception) -> str:
  """The message for the client: our own errors as they are, of others the
  first line."""
  text = (str(error).splitlines() or [''])[0][:300]
  own_types = (ValueError, ArithmeticError)
  if type(error) in own_types or isinstance(error, RequestRefused):
    return text
  return f'{type(error).__name__}: {text}'
