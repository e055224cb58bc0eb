# SPDX-License-Identifier: Apache-2.0
"""The prefix cache: assigns slots, and reuses keys and values of prefixes.

A slot keeps its keys and values when its sequence has finished. A new sequence
reuses them up to the first different token, if it has the same adapter, by its
content hash, and task.
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
    key: the adapter and the task with which they were computed.
    busy: whether a sequence has the slot.
    last_used: a counter's value when the slot was last taken or released.
  """

  number: int
  ids: list[int] = dataclasses.field(default_factory=list)
  key: str = ''
  busy: bool = False
  last_used: int = 0

  def common_prefix(self, ids: Sequence[int], key: str) -> int:
    """The length of the common prefix of `ids` and the slot's tokens."""
    if self.key != key:
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

  def take(self, ids: Sequence[int], key: str) -> SlotAssignment:
    """Assigns a free slot to a sequence.

    The slot with the longest common prefix is taken if it is free and loses at
    most half of its tokens. Otherwise the prefix is copied into the least
    recently used slot, if it is long enough to be worth the copy.

    Args:
      ids: the tokens that may be reused; () for none.
      key: `Sequence.cache_key`.

    Raises:
      ValueError: no slot is free.
    """
    free = [slot for slot in self.slots if not slot.busy]
    if not free:
      raise ValueError('no slot is free; look at `free` first')
    lru = min(free, key=lambda slot: (len(slot.ids) > 0, slot.last_used))
    best = max(self.slots, key=lambda slot: slot.common_prefix(ids, key))
    prefix = best.common_prefix(ids, key)
    in_place = not best.busy and (best is lru or 2 * prefix >= len(best.ids))
    if prefix and in_place:
      return self._assign(best, best.ids[:prefix], key)
    if prefix >= _MIN_COPY:
      return self._assign(lru, best.ids[:prefix], key, best)
    return self._assign(lru, [], key)

  def release(self, slot: Slot) -> None:
    """Frees a slot; its keys and values stay for reuse."""
    self._clock += 1
    slot.busy, slot.last_used = False, self._clock

  def invalidate(self) -> None:
    """Discards the keys and values of all slots."""
    for slot in self.slots:
      slot.ids = []

  def _assign(self, slot, ids, key, source=None):
    self._clock += 1
    slot.ids, slot.key = list(ids), key
    slot.busy, slot.last_used = True, self._clock
    return SlotAssignment(slot, source)
