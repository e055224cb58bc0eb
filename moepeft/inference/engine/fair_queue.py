# SPDX-License-Identifier: Apache-2.0
"""Who is next: clients take turns, and each one's requests keep their order."""

import collections
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar('T')


class FairQueue(Generic[T]):
  """A queue of queues; one client's many requests do not hold up another's."""

  def __init__(self):
    self._clients: collections.OrderedDict[str, collections.deque[T]] = (
      collections.OrderedDict()
    )

  def __len__(self) -> int:
    return sum(map(len, self._clients.values()))

  def __iter__(self) -> Iterator[T]:
    for queue in self._clients.values():
      yield from queue

  def put(self, client: str, item: T) -> None:
    """A client that had nothing is the last to have its turn."""
    self._clients.setdefault(client, collections.deque()).append(item)

  def take(self) -> T:
    """The first of the client whose turn it is, whose next comes last.

    Raises:
      IndexError: nothing waits.
    """
    if not self._clients:
      raise IndexError('nothing waits; look at the length first')
    client, queue = self._clients.popitem(last=False)
    item = queue.popleft()
    if queue:
      self._clients[client] = queue
    return item

  def put_back(self, client: str, item: T) -> None:
    """What was taken is the next again."""
    queue = self._clients.setdefault(client, collections.deque())
    queue.appendleft(item)
    self._clients.move_to_end(client, last=False)

  def remove(self, client: str, item: T) -> None:
    """Takes one out of its queue.

    Raises:
      ValueError: it does not wait.
    """
    queue = self._clients.get(client, collections.deque())
    queue.remove(item)
    if not queue:
      del self._clients[client]
