# SPDX-License-Identifier: Apache-2.0
"""The engine's step: runs the scheduler's batches on the model runner.

It also finishes sequences, including those whose computation failed. Only the
engine thread uses it.
"""

import collections
from collections.abc import Callable

import jax

from moepeft.core.types import Tree
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import (
  FAILED,
  LENGTH,
  STOP,
  EngineFull,
  Event,
  Finished,
  Request,
  RequestRefused,
  Token,
  TokenLogprob,
)
from moepeft.inference.engine import sampler
from moepeft.inference.engine.calls import RetryLater
from moepeft.inference.engine.decode_step import decode_step
from moepeft.inference.engine.limits import check_request_length
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.prefill import (
  DecoderPrefill,
  EncoderDecoderPrefill,
)
from moepeft.inference.engine.prefix_cache import PrefixCache
from moepeft.inference.engine.scheduler import Scheduler
from moepeft.inference.engine.sequence import Sequence

# After this many consecutive failures the engine, not a request, is at fault.
_MAX_FAILURES = 4


class EngineCore:
  """Runs the batches of a scheduler on a model runner.

  Attributes:
    runner: the model with its adapters.
    scheduler: the waiting and the running sequences.
    prefill: the prefill of the model's kind.
    finished: {finish reason: number of requests}.
    prompt_tokens, cached_tokens, answer_tokens: totals over finished requests.
    failure_message: why the engine has stopped computing; '' while it works.
  """

  def __init__(
    self, runner: ModelRunner, on_finish: Callable[[Sequence], None]
  ):
    """
    Args:
      on_finish: called with each sequence after its last event.
    """
    self.runner, self._on_finish = runner, on_finish
    decoder_only = hasattr(runner.model, 'extend')
    prefill = DecoderPrefill if decoder_only else EncoderDecoderPrefill
    slots = PrefixCache(runner.config.slots)
    self.prefill = prefill(runner, slots)
    self.scheduler = Scheduler(slots, self.prefill.batch_size)
    self._failures = 0
    self.finished: collections.Counter[str] = collections.Counter()
    self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0
    self.failure_message = ''

  def step(self) -> None:
    """Finishes expired sequences, admits others, prefills a chunk, decodes."""
    for sequence, reason in self.scheduler.expired():
      self.finish(sequence, reason)
    self.scheduler.admit(self._begin)
    self._prefill()
    self._decode()
    if self.failure_message:
      self.finish_all(FAILED, self.failure_message)

  def finish_all(self, reason: str, message: str = '') -> None:
    for sequence in self.scheduler.unfinished:
      self.finish(sequence, reason, message)

  def finish(self, sequence: Sequence, reason: str, message: str = '') -> None:
    """Frees a sequence's slot and adapter, and delivers its last event."""
    self.scheduler.remove(sequence)
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

  def update_weights(self, variables: Tree) -> None:
    """Replaces the weights; see `Engine.update_weights`.

    Raises:
      RetryLater: a sequence is waiting or running.
    """
    if self.scheduler.busy:
      raise RetryLater
    unknown = variables.keys() - {'params', 'peft'}
    if unknown or not variables:
      raise ValueError(
        f"expected the collections 'params' and 'peft'; got {sorted(variables)}"
      )
    if variables.get('peft'):
      if not isinstance(self.runner.adapters, FixedAdapter):
        raise ValueError(
          "the engine has a pool of adapters; load one instead of giving 'peft'"
        )
      peft = variables['peft']
      if self.runner.weights.device is not None:
        peft = jax.device_put(peft, self.runner.weights.device)
      self.runner.adapters.replace(peft)
    if 'params' in variables:
      self.runner.weights.update(variables['params'])
    # Cached prefixes and encoder states were computed with the old weights.
    self.scheduler.slots.invalidate()
    if isinstance(self.prefill, EncoderDecoderPrefill):
      self.prefill.clear_cache()

  def _free_slot(self, sequence: Sequence, reason: str) -> None:
    """Clears a slot whose cache may contain NaN before it is reused."""
    slot = sequence.slot
    if reason == FAILED or not sequence.finite:
      slot.ids = []
      self._run_or_stop(lambda: self.runner.clear(slot.number))
    self.scheduler.slots.release(slot)

  def _begin(self, sequence: Sequence) -> bool:
    """Acquires an adapter and a slot.

    Returns:
      False if that failed; the sequence is finished then.

    Raises:
      EngineFull: no slot is free for the adapter now.
    """
    request, runner = sequence.request, self.runner
    try:
      sequence.set_adapter(runner.adapters.acquire(request.adapter))
      # The name may refer to another adapter than when the request was checked.
      soft_prompt = len(sequence.adapter.soft_prompt_ids)
      check_request_length(request, runner.model, runner.config, soft_prompt)
    except EngineFull:
      raise
    except Exception as e:
      self.finish(sequence, FAILED, _client_message(e))
      return False
    return self._run_for([sequence], lambda: self.prefill.assign_slot(sequence))

  def _prefill(self) -> None:
    """Reads a chunk of the oldest prompts that are not read completely."""
    batch = self.scheduler.prefill_batch()
    if batch:
      self._run_for(batch, lambda: self.prefill.read_chunk(batch))
    for sequence in self.scheduler.decode_batch():
      if not sequence.request.max_new_tokens:
        sequence.finite = True
        self.finish(sequence, LENGTH)

  def _decode(self) -> None:
    """Adds a token to every sequence whose prompt is prefilled."""
    batch = self.scheduler.decode_batch()
    if not batch:
      return
    try:
      output = decode_step(self.runner, self.prefill, batch)
      tokens = sampler.sample(self.runner.programs, batch, output)
    except Exception as e:
      self._fail(batch, e)
      return
    self._failures = 0
    for sequence, token in zip(batch, tokens, strict=True):
      if isinstance(token, Exception):
        self.finish(sequence, FAILED, _client_message(token))
      else:
        self._run_for(
          [sequence], lambda s=sequence, t=token: self._append(s, t)
        )

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

  def _run_for(self, batch: list[Sequence], run: Callable[[], None]) -> bool:
    """Runs a computation; returns False, and fails the batch, if it raises."""
    try:
      run()
    except Exception as e:
      self._fail(batch, e)
      return False
    return True

  def _fail(self, batch: list[Sequence], error: Exception) -> None:
    """Finishes the sequences of a failed computation; the others continue."""
    self._failures += not isinstance(error, ArithmeticError | ValueError)
    if not self.runner.cache_intact:
      # The failed program was writing to it.
      batch = list(dict.fromkeys([*batch, *self.scheduler.running]))
      self.scheduler.slots.invalidate()
      self._run_or_stop(self.runner.reset_cache)
    for sequence in batch:
      self.finish(sequence, FAILED, _client_message(error))
    if self._failures >= _MAX_FAILURES:
      self._stop(error)

  def _run_or_stop(self, run: Callable[[], None]) -> None:
    try:
      run()
    except Exception as e:
      self._stop(e)

  def _stop(self, error: Exception) -> None:
    self.failure_message = self.failure_message or (
      f'the engine has stopped: {_client_message(error)}; restart the server'
    )


def _client_message(error: Exception) -> str:
  """The message for the client; other libraries' errors are cut to a line."""
  text = (str(error).splitlines() or [''])[0][:300]
  if type(error) in (ValueError, ArithmeticError):
    return text
  if isinstance(error, RequestRefused):
    return text
  return f'{type(error).__name__}: {text}'


def check_generation(runner: ModelRunner) -> None:
  """Generates one token after a prompt, as a test of every program type.

  Raises:
    RuntimeError: the generation failed.
  """
  events: list[Event] = []
  core = EngineCore(runner, lambda sequence: None)
  prompt = (0,) * max(1, min(3, runner.config.max_model_len - 2))
  request = Request('first', prompt, 2)
  core.scheduler.add(Sequence(request, events.append))
  while core.scheduler.busy:
    core.step()
  if events[-1].reason != LENGTH:
    raise RuntimeError(f'the first generation failed: {events[-1].message}')
