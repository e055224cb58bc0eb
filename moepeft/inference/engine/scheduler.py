# SPDX-License-Identifier: Apache-2.0
"""The scheduler: which sequences get slots, and what the next step computes.

A policy without a model: `EngineCore` does what it decides.
"""

import time
from collections.abc import Callable

from moepeft.inference.api import CANCELLED, TIME, EngineFull
from moepeft.inference.engine.fair_queue import FairQueue
from moepeft.inference.engine.prefix_cache import PrefixCache
from moepeft.inference.engine.sequence import Sequence


class Scheduler:
  """The sequences that wait, and those that have slots.

  Attributes:
    slots: the rows of the cache.
    slot_seconds: moving average of the time for which a sequence has a slot.
  """

  def __init__(self, slots: PrefixCache, prefill_batch_size: int):
    """
    Args:
      prefill_batch_size: prompts that are read at once.
    """
    self.slots = slots
    self.slot_seconds = 1.0
    self._prefill_batch_size = prefill_batch_size
    self._waiting: FairQueue[Sequence] = FairQueue()
    self._running: list[Sequence] = []

  @property
  def busy(self) -> bool:
    return bool(self._running or len(self._waiting))

  @property
  def unfinished(self) -> list[Sequence]:
    return [*self._waiting, *self._running]

  @property
  def running(self) -> list[Sequence]:
    """Those that have slots, the first admitted first."""
    return [*self._running]

  def add(self, sequence: Sequence) -> None:
    self._waiting.put(sequence.request.client, sequence)

  def remove(self, sequence: Sequence) -> None:
    """Forgets a sequence that has ended."""
    if sequence in self._running:
      self._running.remove(sequence)
      seconds = time.monotonic() - sequence.started
      self.slot_seconds += 0.1 * (seconds - self.slot_seconds)
    elif sequence in self._waiting:
      self._waiting.remove(sequence.request.client, sequence)

  def waits_for(self, adapter: str) -> bool:
    """Whether a request of an adapter has no slot yet."""
    return any(s.request.adapter == adapter for s in self._waiting)

  def expired(self) -> list[tuple[Sequence, str]]:
    """Sequences that are cancelled or late, with the reason of their end."""
    now, ends = time.monotonic(), []
    for sequence in self.unfinished:
      if sequence.cancelled:
        ends.append((sequence, CANCELLED))
      elif sequence.timed_out(now):
        ends.append((sequence, TIME))
    return ends

  def admit(self, begin: Callable[[Sequence], bool]) -> None:
    """Gives free slots to waiting sequences; clients take turns.

    Args:
      begin: takes an adapter and a slot for a sequence; False where it has
        ended instead. May raise EngineFull where the adapters of running
        sequences leave no room for its own: others do not wait for it.
    """
    put_off = []
    while len(self._waiting) and self.slots.free():
      sequence = self._waiting.take()
      try:
        if begin(sequence):
          self._running.append(sequence)
      except EngineFull:
        put_off.append(sequence)
    for sequence in reversed(put_off):
      self._waiting.put_back(sequence.request.client, sequence)

  def prefill_batch(self) -> list[Sequence]:
    """A chunk of whose prompts is read next: those that came first."""
    batch = [s for s in self._running if not s.prefilled]
    return batch[: self._prefill_batch_size]

  def decode_batch(self) -> list[Sequence]:
    """All whose prompts are read: each gets a token."""
    return [s for s in self._running if s.prefilled]
