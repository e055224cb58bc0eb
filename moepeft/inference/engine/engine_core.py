# SPDX-License-Identifier: Apache-2.0
"""The core of an engine: schedules, computes and finishes requests in steps.

Only the engine thread calls it.
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

# Proposes tokens that may follow each sequence's last, up to a number for each.
Proposer = Callable[[list[Sequence], list[int]], list[tuple[int, ...]]]
# More consecutive failures are not due to single requests; the engine stops.
_MAX_FAILURES = 4


class EngineCore:
  """Runs the batches of a scheduler on a model runner.

  Attributes:
    runner: the model with its adapters.
    scheduler: the waiting and the running sequences.
    prefill: the prefill for decoder-only or encoder-decoder models.
    finished: {finish reason: number of requests}.
    prompt_tokens, cached_tokens, answer_tokens: totals over finished requests.
    proposed_tokens, accepted_tokens: totals over decode steps.
    failure_message: the reason why the engine has stopped, or ''.
  """

  def __init__(
    self,
    runner: ModelRunner,
    on_finish: Callable[[Sequence], None] = lambda sequence: None,
    propose: Proposer | None = None,
  ):
    """
    Args:
      on_finish: called with each sequence after its last event.
      propose: proposes up to `num_proposed_tokens` of the config for each
        sequence; None for no proposals.
    """
    self.runner, self._on_finish, self._proposer = runner, on_finish, propose
    decoder_only = hasattr(runner.model, 'extend')
    prefill = DecoderPrefill if decoder_only else EncoderDecoderPrefill
    prefix_cache = PrefixCache(runner.config.slots)
    self.prefill = prefill(runner, prefix_cache)
    self.scheduler = Scheduler(prefix_cache, self.prefill.batch_size)
    self._failures = 0
    self.finished: collections.Counter[str] = collections.Counter()
    self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0
    self.proposed_tokens = self.accepted_tokens = 0
    self.failure_message = ''

  def step(self) -> None:
    """Finishes expired sequences, admits waiting ones, prefills and decodes."""
    for sequence, reason in self.scheduler.expired():
      self.finish(sequence, reason)
    self.scheduler.admit(self._start)
    self._prefill()
    waits = self.runner.config.prefill_first and self.scheduler.prefill_batch()
    if not waits:
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
      sequence.num_cached_tokens,
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
    if self.scheduler.has_unfinished:
      raise RetryLater
    unknown = variables.keys() - {'params', 'peft'}
    if unknown or not variables:
      raise ValueError(
        f"expected the collections 'params' and 'peft'; got {sorted(variables)}"
      )
    if variables.get('peft'):
      if not isinstance(self.runner.adapters, FixedAdapter):
        raise ValueError(
          "the engine has a pool of adapters, so it takes no 'peft'; call "
          '`load_adapter` instead'
        )
      peft = variables['peft']
      if self.runner.weights.device is not None:
        peft = jax.device_put(peft, self.runner.weights.device)
      self.runner.adapters.replace(peft)
    if 'params' in variables:
      self.runner.weights.update(variables['params'])
    # Cached prefixes and encoder states were computed with the old weights.
    self.scheduler.prefix_cache.invalidate()
    if isinstance(self.prefill, EncoderDecoderPrefill):
      self.prefill.clear_cache()

  def _free_slot(self, sequence: Sequence, reason: str) -> None:
    """Releases a slot; clears its cache first if it may contain NaN."""
    slot = sequence.slot
    if reason == FAILED or not sequence.has_finite_logits:
      slot.ids = []
      self._run_or_stop(lambda: self.runner.clear_slot(slot.number))
    self.scheduler.prefix_cache.release(slot)

  def _start(self, sequence: Sequence) -> bool:
    """Acquires an adapter and a slot.

    Returns:
      Whether it succeeded; if not, the sequence is finished as failed.

    Raises:
      EngineFull: all slots of the adapter's bucket are in use.
    """
    request, runner = sequence.request, self.runner
    try:
      sequence.set_adapter(runner.adapters.acquire(request.adapter))
      # Checked again: the adapter of this name may have been replaced since.
      soft_prompt = len(sequence.adapter.soft_prompt_ids)
      check_request_length(request, runner.model, runner.config, soft_prompt)
    except EngineFull:
      raise
    except Exception as e:
      self.finish(sequence, FAILED, _error_message(e))
      return False
    return self._run_or_fail(
      [sequence], lambda: self.prefill.assign_slot(sequence)
    )

  def _prefill(self) -> None:
    """Prefills a chunk of the oldest prompts that are not prefilled."""
    batch = self.scheduler.prefill_batch()
    if batch:
      self._run_or_fail(batch, lambda: self.prefill.read_chunk(batch))
    for sequence in self.scheduler.decode_batch():
      if not sequence.request.max_new_tokens:
        sequence.has_finite_logits = True
        self.finish(sequence, LENGTH)

  def _decode(self) -> None:
    """Adds a token to every sequence whose prompt is prefilled."""
    batch = self.scheduler.decode_batch()
    if not batch:
      return
    try:
      proposals = self._propose(batch)
      output = decode_step(self.runner, self.prefill, batch, proposals)
    except Exception as e:
      self._fail(batch, e)
      return
    rows = list(enumerate(batch))
    for position in range(output.tokens.shape[1]):
      rows = self._accept_tokens(rows, output, position, proposals)
      if not rows:
        return

  def _propose(self, batch: list[Sequence]) -> list[tuple[int, ...]]:
    """The tokens that may follow each sequence's last."""
    if self._proposer is None:
      return [()] * len(batch)
    counts = [
      min(
        self.runner.config.num_proposed_tokens,
        sequence.request.max_new_tokens - len(sequence.answer) - 1,
      )
      for sequence in batch
    ]
    proposals = self._proposer(batch, counts)
    self.proposed_tokens += sum(map(len, proposals))
    return proposals

  def _accept_tokens(
    self,
    rows: list[tuple[int, Sequence]],
    output: sampler.StepOutput,
    position: int,
    proposals: list[tuple[int, ...]],
  ) -> list[tuple[int, Sequence]]:
    """Adds a token to sequences.

    Args:
      rows: sequences whose tokens up to `position` are in the row's sequence.

    Returns:
      The rows whose token is the one that was proposed.
    """
    batch = [sequence for _, sequence in rows]
    try:
      tokens = sampler.sample(self.runner.programs, rows, output, position)
    except Exception as e:
      self._fail(batch, e)
      return []
    self._failures = 0
    accepted = []
    for (row, sequence), token in zip(rows, tokens, strict=True):
      if isinstance(token, Exception):
        self.finish(sequence, FAILED, _error_message(token))
        continue
      self._run_or_fail(
        [sequence], lambda s=sequence, t=token: self._append_token(s, t)
      )
      if proposals[row][position : position + 1] == (token.id,):
        self.accepted_tokens += 1
        if sequence in self.scheduler.running:
          accepted.append((row, sequence))
    return accepted

  def _append_token(self, sequence: Sequence, token: TokenLogprob) -> None:
    """Delivers a token, and finishes the sequence if it was the last."""
    self.prefill.record_cached_token(sequence)
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

  def _run_or_fail(
    self, batch: list[Sequence], run: Callable[[], None]
  ) -> bool:
    """Runs a computation, and fails the batch if it raises; returns success."""
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
      # The failed program had the cache's buffers, which are lost for all.
      batch = list(dict.fromkeys([*batch, *self.scheduler.running]))
      self.scheduler.prefix_cache.invalidate()
      self._run_or_stop(self.runner.reset_cache)
    for sequence in batch:
      self.finish(sequence, FAILED, _error_message(error))
    if self._failures >= _MAX_FAILURES:
      self._stop(error)

  def _run_or_stop(self, run: Callable[[], None]) -> None:
    try:
      run()
    except Exception as e:
      self._stop(e)

  def _stop(self, error: Exception) -> None:
    self.failure_message = self.failure_message or (
      f'the engine has stopped: {_error_message(error)}; restart the server'
    )


def _error_message(error: Exception) -> str:
  """The message for the client: the first line, with the type if unexpected."""
  text = (str(error).splitlines() or [''])[0][:300]
  if type(error) in (ValueError, ArithmeticError):
    return text
  if isinstance(error, RequestRefused):
    return text
  return f'{type(error).__name__}: {text}'


def run_test_request(runner: ModelRunner) -> None:
  """Generates two tokens from a prompt, which runs each kind of program.

  Raises:
    RuntimeError: the request failed.
  """
  events: list[Event] = []
  core = EngineCore(runner)
  prompt = (0,) * max(1, min(3, runner.config.max_model_len - 2))
  adapter = runner.adapters.acquire('')
  request = Request(
    *('test', prompt, 2),
    task=next(iter(adapter.tasks), ''),
    embedding=(0.0,) * adapter.embedding_size,
  )
  runner.adapters.release(adapter)
  core.scheduler.add(Sequence(request, events.append))
  while core.scheduler.has_unfinished:
    core.step()
  if events[-1].reason != LENGTH:
    raise RuntimeError(f'the test request failed: {events[-1].message}')
