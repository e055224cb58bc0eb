# SPDX-License-Identifier: Apache-2.0
"""The slots of an adapter bucket, with LRU eviction."""

import collections

from moepeft.inference.api import EngineFull


class LruSlots:
  """The slots 1, 2, ... of a bucket; slot 0 is the base.

  The keys are the adapters' hashes. The least recently used adapter that no
  request uses is evicted.
  """

  def __init__(self, count: int):
    self._free = list(range(count - 1, 0, -1))
    # In order of use, the least recently used first.
    self._slots: collections.OrderedDict[str, int] = collections.OrderedDict()
    self._users: collections.Counter[str] = collections.Counter()

  def __contains__(self, sha256: str) -> bool:
    return sha256 in self._slots

  def __getitem__(self, sha256: str) -> int:
    return self._slots[sha256]

  def users(self, sha256: str) -> int:
    return self._users[sha256]

  def has_free(self) -> bool:
    """Whether `take` would find a slot."""
    return bool(self._free) or any(not self._users[c] for c in self._slots)

  def take(self, sha256: str) -> int:
    """Assigns a slot to an adapter that has none.

    Raises:
      EngineFull: requests use every slot.
    """
    if not self._free:
      idle = next((c for c in self._slots if not self._users[c]), None)
      if idle is None:
        raise EngineFull(
          f'requests use all {len(self._slots)} slots for adapters of this '
          'method; try again, or start the server with more --adapter_slots',
          seconds=1,
        )
      self.drop(idle)
    self._slots[sha256] = self._free.pop()
    return self._slots[sha256]

  def acquire(self, sha256: str) -> None:
    self._users[sha256] += 1
    self._slots.move_to_end(sha256)

  def release(self, sha256: str) -> None:
    if not self._users[sha256]:
      raise ValueError('released more often than acquired')
    self._users[sha256] -= 1

  def drop(self, sha256: str) -> None:
    """Frees the slot of an adapter that no request uses, if it has one."""
    if self._users[sha256]:
      raise ValueError('requests still use it')
    if sha256 in self._slots:
      self._free.append(self._slots.pop(sha256))
