# SPDX-License-Identifier: Apache-2.0
"""The scheduler: assigns slots to sequences, and forms the batches of a step.

It does not use the model; `EngineCore` runs the batches.
"""

import time
from collections.abc import Callable

from moepeft.inference.api import CANCELLED, TIME, EngineFull
from moepeft.inference.engine.fair_queue import FairQueue
from moepeft.inference.engine.prefix_cache import PrefixCache
from moepeft.inference.engine.sequence import Sequence


class Scheduler:
  """The waiting and the running sequences.

  Attributes:
    slots: the slots of the cache.
    slot_seconds: moving average of the seconds for which a sequence has a slot.
  """

  def __init__(self, slots: PrefixCache, prefill_batch_size: int):
    """
    Args:
      prefill_batch_size: the largest number of prompts in a prefill batch.
    """
    self.prefix_cache = slots
    self.slot_seconds = 1.0
    self._prefill_batch_size = prefill_batch_size
    self._waiting: FairQueue[Sequence] = FairQueue()
    self._running: list[Sequence] = []

  @property
  def has_unfinished(self) -> bool:
    return bool(self._running or len(self._waiting))

  @property
  def unfinished(self) -> list[Sequence]:
    return [*self._waiting, *self._running]

  @property
  def running(self) -> list[Sequence]:
    """The sequences that have slots, in the order of their admission."""
    return [*self._running]

  def add(self, sequence: Sequence) -> None:
    self._waiting.put(sequence.request.client, sequence)

  def remove(self, sequence: Sequence) -> None:
    """Removes a finished sequence."""
    if sequence in self._running:
      self._running.remove(sequence)
      seconds = time.monotonic() - sequence.started
      self.slot_seconds += 0.1 * (seconds - self.slot_seconds)
    elif sequence in self._waiting:
      self._waiting.remove(sequence.request.client, sequence)

  def waits_for(self, adapter: str) -> bool:
    """Whether a request that names the adapter waits for a slot."""
    return any(s.request.adapter == adapter for s in self._waiting)

  def expired(self) -> list[tuple[Sequence, str]]:
    """The cancelled and timed-out sequences, with their finish reasons."""
    now, expired = time.monotonic(), []
    for sequence in self.unfinished:
      if sequence.cancelled:
        expired.append((sequence, CANCELLED))
      elif sequence.timed_out(now):
        expired.append((sequence, TIME))
    return expired

  def admit(self, begin: Callable[[Sequence], bool]) -> None:
    """Gives free slots to waiting sequences; clients take turns.

    Args:
      begin: acquires an adapter and a slot for a sequence; returns False if the
        sequence failed. If it raises EngineFull, because running sequences
        use all slots of the adapter's bucket, the sequence continues to wait.
    """
    deferred = []
    while len(self._waiting) and self.prefix_cache.free():
      sequence = self._waiting.take()
      try:
        if begin(sequence):
          self._running.append(sequence)
      except EngineFull:
        deferred.append(sequence)
    for sequence in reversed(deferred):
      self._waiting.put_back(sequence.request.client, sequence)

  def prefill_batch(self) -> list[Sequence]:
    """The oldest sequences whose prompts are not completely prefilled."""
    batch = [s for s in self._running if not s.prefilled]
    return batch[: self._prefill_batch_size]

  def decode_batch(self) -> list[Sequence]:
    """The sequences whose prompts are prefilled."""
    return [s for s in self._running if s.prefilled]
