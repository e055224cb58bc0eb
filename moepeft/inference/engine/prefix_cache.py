# SPDX-License-Identifier: Apache-2.0
"""Which slot a request gets, and whose keys and values it need not compute.

A slot keeps the text that its keys and values are of when its request has
ended. A request that begins with the same text and has the same adapter, by
the hash of its content, goes on from there.
"""

import dataclasses
from collections.abc import Sequence

# A shorter beginning is not worth a copy.
_WORTH = 16


@dataclasses.dataclass
class Slot:
  """A row of the cache.

  Attributes:
    ids: what its keys and values are of, from the first place on.
    sha256: of the adapter that they were computed with.
    busy: whether a request has it.
    used: when it was last taken or left; the greater the later.
  """

  number: int
  ids: list[int] = dataclasses.field(default_factory=list)
  sha256: str = ''
  busy: bool = False
  used: int = 0

  def shared(self, ids: Sequence[int], sha256: str) -> int:
    """How many of the first ids are there already."""
    if self.sha256 != sha256:
      return 0
    pairs = enumerate(zip(self.ids, ids, strict=False))
    return next(
      (i for i, (a, b) in pairs if a != b), min(len(self.ids), len(ids))
    )


@dataclasses.dataclass(frozen=True)
class SlotAssignment:
  """Where a request goes.

  Attributes:
    slot: now busy; its ids are those that are there already.
    source: the slot whose keys and values must be copied first, or None.
  """

  slot: Slot
  source: Slot | None = None


class PrefixCache:
  """All slots."""

  def __init__(self, slots: int):
    self.slots = [Slot(number) for number in range(slots)]
    self._clock = 0

  def free(self) -> int:
    """How many slots no request has."""
    return sum(not slot.busy for slot in self.slots)

  def take(self, ids: Sequence[int], sha256: str) -> SlotAssignment:
    """Gives a free slot: one with the longest common beginning, or the one
    used longest ago, into which that beginning is copied where the slot that
    has it is busy or has more to lose than there is to gain.

    Args:
      ids: what of the prompt may be taken over; () for nothing.

    Raises:
      ValueError: no slot is free.
    """
    free = [slot for slot in self.slots if not slot.busy]
    if not free:
      raise ValueError('no slot is free; look at `free` first')
    oldest = min(free, key=lambda slot: (len(slot.ids) > 0, slot.used))
    best = max(self.slots, key=lambda slot: slot.shared(ids, sha256))
    shared = best.shared(ids, sha256)
    inside = not best.busy and (best is oldest or 2 * shared >= len(best.ids))
    if shared and inside:
      return self._taken(best, best.ids[:shared], sha256)
    if shared >= _WORTH:
      return self._taken(oldest, best.ids[:shared], sha256, best)
    return self._taken(oldest, [], sha256)

  def leave(self, slot: Slot) -> None:
    """The request has ended; what the slot holds may be used again."""
    self._clock += 1
    slot.busy, slot.used = False, self._clock

  def forget(self, slot: Slot) -> None:
    """Its keys and values are of nothing any more."""
    slot.ids = []

  def _taken(self, slot, ids, sha256, source=None):
    self._clock += 1
    slot.ids, slot.sha256 = list(ids), sha256
    slot.busy, slot.used = True, self._clock
    return SlotAssignment(slot, source)
