# SPDX-License-Identifier: Apache-2.0
"""The prefix cache: assigns slots, and reuses keys and values of prefixes.

A slot keeps its keys and values when its sequence has finished. A new sequence
reuses them up to the first different token, if its adapter has the same content
hash.
"""

import dataclasses
from collections.abc import Sequence

# A shorter prefix is not worth a copy.
_MIN_COPY = 16


@dataclasses.dataclass
class Slot:
  """A row of the cache.

  Attributes:
    ids: the tokens of its keys and values, from position 0 on.
    sha256: content hash of the adapter that computed them.
    busy: whether a sequence has the slot.
    last_used: a counter's value when the slot was last taken or released.
  """

  number: int
  ids: list[int] = dataclasses.field(default_factory=list)
  sha256: str = ''
  busy: bool = False
  last_used: int = 0

  def common_prefix(self, ids: Sequence[int], sha256: str) -> int:
    """The length of the common prefix of `ids` and the slot's tokens."""
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
    slot: the slot, now busy; `slot.ids` are the reused tokens.
    source: the slot from which their keys and values must be copied; None if
      they are in `slot` already.
  """

  slot: Slot
  source: Slot | None = None


class PrefixCache:
  """The slots of an engine."""

  def __init__(self, slots: int):
    self.slots = [Slot(number) for number in range(slots)]
    self._clock = 0

  def free(self) -> int:
    """The number of slots that no sequence has."""
    return sum(not slot.busy for slot in self.slots)

  def take(self, ids: Sequence[int], sha256: str) -> SlotAssignment:
    """Assigns a free slot to a sequence.

    The slot with the longest common prefix is taken if it is free and loses at
    most half of its tokens. Otherwise the prefix is copied into the least
    recently used slot, if it is long enough to be worth the copy.

    Args:
      ids: the tokens that may be reused; () for none.
      sha256: content hash of the sequence's adapter.

    Raises:
      ValueError: no slot is free.
    """
    free = [slot for slot in self.slots if not slot.busy]
    if not free:
      raise ValueError('no slot is free; look at `free` first')
    lru = min(free, key=lambda slot: (len(slot.ids) > 0, slot.last_used))
    best = max(self.slots, key=lambda slot: slot.common_prefix(ids, sha256))
    prefix = best.common_prefix(ids, sha256)
    in_place = not best.busy and (best is lru or 2 * prefix >= len(best.ids))
    if prefix and in_place:
      return self._assign(best, best.ids[:prefix], sha256)
    if prefix >= _MIN_COPY:
      return self._assign(lru, best.ids[:prefix], sha256, best)
    return self._assign(lru, [], sha256)

  def release(self, slot: Slot) -> None:
    """Frees a slot; its keys and values stay for reuse."""
    self._clock += 1
    slot.busy, slot.last_used = False, self._clock

  def invalidate(self) -> None:
    """Discards the keys and values of all slots."""
    for slot in self.slots:
      slot.ids = []

  def _assign(self, slot, ids, sha256, source=None):
    self._clock += 1
    slot.ids, slot.sha256 = list(ids), sha256
    slot.busy, slot.last_used = True, self._clock
    return SlotAssignment(slot, source)
