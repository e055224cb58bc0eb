# SPDX-License-Identifier: Apache-2.0
"""The slots of a bucket of adapters: users, and eviction."""

import collections

from moepeft.inference.api import EngineFull


class LruSlots:
  """The slots 1, 2, ... of one bucket; slot 0 is the base's.

  Contents are named by their hash. One that is used stays; of the others the
  one that was used longest ago is evicted.
  """

  def __init__(self, count: int):
    self._free = list(range(count - 1, 0, -1))
    # The one used longest ago first.
    self._slots: collections.OrderedDict[str, int] = collections.OrderedDict()
    self._users: collections.Counter[str] = collections.Counter()

  def __contains__(self, content: str) -> bool:
    return content in self._slots

  def __getitem__(self, content: str) -> int:
    return self._slots[content]

  def users(self, content: str) -> int:
    return self._users[content]

  def has_room(self) -> bool:
    """Whether `take` finds a slot."""
    return bool(self._free) or any(not self._users[c] for c in self._slots)

  def take(self, content: str) -> int:
    """A slot for a content that has none.

    Raises:
      Full: requests use every slot.
    """
    if not self._free:
      idle = next((c for c in self._slots if not self._users[c]), None)
      if idle is None:
        raise EngineFull(
          f'requests use all {len(self._slots)} places for adapters of this '
          'form; try again, or start the server with more slots',
          seconds=1,
        )
      self.drop(idle)
    self._slots[content] = self._free.pop()
    return self._slots[content]

  def acquire(self, content: str) -> None:
    self._users[content] += 1
    self._slots.move_to_end(content)

  def release(self, content: str) -> None:
    if not self._users[content]:
      raise ValueError('released more often than acquired')
    self._users[content] -= 1

  def drop(self, content: str) -> None:
    """Gives the slot back of one that nobody uses, if it has one."""
    if self._users[content]:
      raise ValueError('requests still use it')
    if content in self._slots:
      self._free.append(self._slots.pop(content))
