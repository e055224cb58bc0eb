# SPDX-License-Identifier: Apache-2.0
"""Assignment of slots, and reuse of the keys and values of a common prefix.

A slot keeps its tokens when its sequence has finished. A new sequence that
begins with the same tokens and has the same adapter, by the hash of its
content, continues from there.
"""

import dataclasses
from collections.abc import Sequence

# A shorter prefix is not worth a copy.
_MIN_COPY = 16


@dataclasses.dataclass
class Slot:
  """A row of the cache.

  Attributes:
    ids: the tokens whose keys and values it holds, from position 0 on.
    sha256: hash of the adapter that they were computed with.
    busy: whether a sequence has it.
    last_used: when it was taken or released; the greater the later.
  """

  number: int
  ids: list[int] = dataclasses.field(default_factory=list)
  sha256: str = ''
  busy: bool = False
  last_used: int = 0

  def common_prefix(self, ids: Sequence[int], sha256: str) -> int:
    """The number of first ids whose keys and values it holds."""
    if self.sha256 != sha256:
      return 0
    pairs = enumerate(zip(self.ids, ids, strict=False))
    return next(
      (i for i, (a, b) in pairs if a != b), min(len(self.ids), len(ids))
    )


@dataclasses.dataclass(frozen=True)
class SlotAssignment:
  """The slot of a new sequence.

  Attributes:
    slot: now busy; its ids are those that need not be computed.
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
    """The number of slots that no sequence has."""
    return sum(not slot.busy for slot in self.slots)

  def take(self, ids: Sequence[int], sha256: str) -> SlotAssignment:
    """Assigns a free slot: the one with the longest common prefix, or the one
    used longest ago, into which that prefix is copied where the slot that has
    it is busy or would lose more than the copy costs.

    Args:
      ids: the tokens that may be reused; () for none.

    Raises:
      ValueError: no slot is free.
    """
    free = [slot for slot in self.slots if not slot.busy]
    if not free:
      raise ValueError('no slot is free; look at `free` first')
    oldest = min(free, key=lambda slot: (len(slot.ids) > 0, slot.last_used))
    best = max(self.slots, key=lambda slot: slot.common_prefix(ids, sha256))
    prefix = best.common_prefix(ids, sha256)
    in_place = not best.busy and (best is oldest or 2 * prefix >= len(best.ids))
    if prefix and in_place:
      return self._assign(best, best.ids[:prefix], sha256)
    if prefix >= _MIN_COPY:
      return self._assign(oldest, best.ids[:prefix], sha256, best)
    return self._assign(oldest, [], sha256)

  def release(self, slot: Slot) -> None:
    """Frees a slot; its keys and values may be reused."""
    self._clock += 1
    slot.busy, slot.last_used = False, self._clock

  def invalidate(self) -> None:
    """Marks the keys and values of all slots as stale."""
    for slot in self.slots:
      slot.ids = []

  def _assign(self, slot, ids, sha256, source=None):
    self._clock += 1
    slot.ids, slot.sha256 = list(ids), sha256
    slot.busy, slot.last_used = True, self._clock
    return SlotAssignment(slot, source)
