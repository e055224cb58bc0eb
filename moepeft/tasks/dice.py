# SPDX-License-Identifier: Apache-2.0
"""Random draws that are the same on every platform and in every version.

NumPy promises stable streams for its bit generators, not for the methods of
`Generator` (NEP 19). So a `Dice` takes 64-bit words from Philox, a counter
based generator with random access, and maps them by integer arithmetic.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar('Item')

_WORDS = 32  # one refill; an instance takes 5 to 30 words


class Dice:
  """The draws of one (seed, stream, index).

  Different triples never share words: seed and stream are the key of the
  cipher and the index is the second word of its counter.

  Args:
    seed: 0 <= seed < 2**64.
    stream: 0 <= stream < 2**64, one number per task.
    index: 0 <= index < 2**64, the place in the stream.
  """

  def __init__(self, seed: int, stream: int, index: int):
    counter = np.array([0, index, 0, 0], np.uint64)
    key = np.array([seed, stream], np.uint64)
    self._bits = np.random.Philox(counter=counter, key=key)
    self._words: list[int] = []

  def below(self, n: int) -> int:
    """A whole number in [0, n); its bias is under n / 2**64."""
    if not self._words:
      self._words = self._bits.random_raw(_WORDS).tolist()
    return self._words.pop() * n >> 64

  def between(self, low: int, high: int) -> int:
    """A whole number in [low, high], both ends included."""
    return low + self.below(high - low + 1)

  def coin(self) -> bool:
    return self.below(2) == 1

  def pick(self, items: Sequence[Item]) -> Item:
    return items[self.below(len(items))]

  def sample(self, items: Sequence[Item], count: int) -> list[Item]:
    """`count` items at different places, in random order."""
    pool = list(items)
    for i in range(count):
      j = i + self.below(len(pool) - i)
      pool[i], pool[j] = pool[j], pool[i]
    return pool[:count]

  def shuffled(self, items: Sequence[Item]) -> list[Item]:
    return self.sample(items, len(items))
