# SPDX-License-Identifier: Apache-2.0
"""A queue in which clients take turns, each one's requests in their order."""

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
    """Appends an item; a client that had none is the last to have its turn."""
    self._clients.setdefault(client, collections.deque()).append(item)

  def take(self) -> T:
    """Removes the first item of the client whose turn it is.

    Raises:
      IndexError: the queue is empty.
    """
    if not self._clients:
      raise IndexError('nothing waits; look at the length first')
    client, queue = self._clients.popitem(last=False)
    item = queue.popleft()
    if queue:
      self._clients[client] = queue
    return item

  def put_back(self, client: str, item: T) -> None:
    """Makes an item that was taken the next one again."""
    queue = self._clients.setdefault(client, collections.deque())
    queue.appendleft(item)
    self._clients.move_to_end(client, last=False)

  def remove(self, client: str, item: T) -> None:
    """
    Raises:
      ValueError: the item does not wait.
    """
    queue = self._clients.get(client, collections.deque())
    queue.remove(item)
    if not queue:
      del self._clients[client]
