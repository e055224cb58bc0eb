# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: who runs, what is computed next, and how each one ends.

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
from moepeft.inference.engine.fair_queue import FairQueue
from moepeft.inference.engine.limits import check_length
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.prefill import Chunks, Inputs, Reader
from moepeft.inference.engine.prefix_cache import PrefixCache
from moepeft.inference.engine.sequence import Running
from moepeft.inference.engine.step import step

# So many computations that fail one after the other are no request's fault.
_BROKEN = 4


class Scheduler:
  """Requests that wait, and those that have slots.

  Attributes:
    finished: requests by the reason of their end.
    prompt_tokens, cached_tokens, answer_tokens: of those.
    seconds: that a request has a slot, about.
    broken: why nothing can be computed any more; ''.
  """

  def __init__(self, core: ModelRunner, ended: Callable[[Running], None]):
    """
    Args:
      ended: called with each request after its last event.
    """
    self._core, self._ended = core, ended
    self._texts = PrefixCache(core.settings.slots)
    decoder_only = hasattr(core.model, 'extend')
    self._reader: Reader = (Chunks if decoder_only else Inputs)(
      core, self._texts
    )
    self._turns: FairQueue[Running] = FairQueue()
    self._rows: list[Running] = []
    self._failures = 0
    self.finished: collections.Counter[str] = collections.Counter()
    self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0
    self.seconds = 1.0
    self.broken = ''

  @property
  def busy(self) -> bool:
    return bool(self._rows or len(self._turns))

  @property
  def free(self) -> int:
    """Slots that no request has."""
    return self._texts.free()

  def arrive(self, row: Running) -> None:
    """Lets a request wait for its turn."""
    self._turns.put(row.request.client, row)

  def waits_for(self, adapter: str) -> bool:
    """Whether a request of an adapter has no slot yet."""
    return any(row.request.adapter == adapter for row in self._turns)

  def turn(self) -> None:
    """Ends what is over, admits, reads a chunk, and takes a step."""
    now = time.monotonic()
    for row in [*self._turns, *self._rows]:
      if row.gone:
        self.end(row, CANCELLED)
      elif row.late(now):
        self.end(row, TIME)
    self._admit()
    self._read()
    self._step()

  def end_all(self, reason: str, message: str = '') -> None:
    for row in [*self._turns, *self._rows]:
      self.end(row, reason, message)

  def end(self, row: Running, reason: str, message: str = '') -> None:
    """Gives back what a request has, and says so."""
    if row in self._rows:
      self._rows.remove(row)
      self.seconds += 0.1 * (time.monotonic() - row.began - self.seconds)
    elif row in self._turns:
      self._turns.remove(row.request.client, row)
    if row.slot is not None:
      self._leave(row, reason)
    if row.held is not None:
      self._core.banks.release(row.held)
    count = Finished(
      reason, len(row.request.ids), row.cached, len(row.answer), message
    )
    self.finished[reason] += 1
    self.prompt_tokens += count.prompt
    self.cached_tokens += count.cached
    self.answer_tokens += count.answer
    row.say(count)
    self._ended(row)

  def _leave(self, row: Running, reason: str) -> None:
    """What was not seen to be numbers may reach no other request."""
    if reason == FAILED or not row.sound:
      self._texts.forget(row.slot)
      self._try(lambda: self._core.clear(row.slot.number))
    self._texts.leave(row.slot)

  def _admit(self) -> None:
    full = []
    while len(self._turns) and self._texts.free() and not self.broken:
      row = self._turns.take()
      try:
        row.hold(self._core.banks.hold(row.request.adapter))
        # Another adapter may have come under its name since it was submitted.
        front = len(row.held.before)
        check_length(row.request, self._core.model, self._core.settings, front)
      except EngineFull:
        # Another's end makes room; who needs no such room does not wait.
        full.append(row)
        continue
      except Exception as e:
        self.end(row, FAILED, _sentence(e))
        continue
      row.began = time.monotonic()
      self._rows.append(row)
      self._of_row(row, self._reader.begin)
    for row in reversed(full):
      self._turns.put_back(row.request.client, row)

  def _read(self) -> None:
    """A part of the prompt that came first of those not read yet."""
    row = next((row for row in self._rows if not row.read), None)
    if row is not None:
      self._of_row(row, self._reader.read)
    for row in [*self._rows]:
      if row.read and not row.request.length:
        row.sound = True
        self.end(row, LENGTH)

  def _step(self) -> None:
    rows = [row for row in self._rows if row.read]
    if not rows:
      return
    try:
      found = step(self._core, self._reader, rows)
    except Exception as e:
      self._broke(rows, e)
      return
    self._failures = 0
    for row, one in zip(rows, found, strict=True):
      if isinstance(one, Exception):
        self.end(row, FAILED, _sentence(one))
      else:
        self._of_row(row, lambda row, one=one: self._add(row, one))

  def _add(self, row: Running, scored: TokenLogprob) -> None:
    """A token of the answer, and whether it was the last."""
    self._reader.stepped(row)
    row.add(scored.id)
    reason, request = '', row.request
    if scored.id in request.ends:
      reason = STOP
    elif request.constraint and request.constraint.accept(scored.id):
      reason = STOP
    elif len(row.answer) >= request.length:
      reason = LENGTH
    row.say(Token(scored))
    if reason:
      self.end(row, reason)

  def _of_row(self, row: Running, do: Callable[[Running], None]) -> None:
    """What only one request is part of."""
    try:
      do(row)
    except Exception as e:
      self._broke([row], e)

  def _broke(self, rows: list[Running], error: Exception) -> None:
    """Ends those that a failed computation was for; the others go on."""
    self._failures += not isinstance(error, ArithmeticError | ValueError)
    lost = not self._core.whole
    if lost:
      # It was being written over.
      rows = [*self._rows]
      for slot in self._texts.slots:
        self._texts.forget(slot)
      self._try(self._core.renew)
    for row in rows:
      self.end(row, FAILED, _sentence(error))
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
  """For the one who asked: ours as they are, of others the first line."""
  text = (str(error).splitlines() or [''])[0][:300]
  if type(error) in (ValueError, ArithmeticError) or isinstance(
    error, RequestRefused
  ):
    return text
  return f'{type(error).__name__}: {text}'
