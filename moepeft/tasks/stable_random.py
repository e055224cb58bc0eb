# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are the same on all platforms and in all versions.

NumPy guarantees stable streams for its bit generators, not for the methods of
`Generator` (NEP 19). So `StableRandom` maps 64-bit words of Philox, a
counter-based generator with random access, with integer arithmetic.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar('Item')

# Words that are generated at once; an instance takes 5 to 30.
_WORDS = 32


class StableRandom:
  """A random generator for one example, with methods as `random.Random` has.

  Generators with different arguments share no words: seed and stream are the
  key of Philox and the index is the second word of its counter.

  Args:
    seed: 0 <= seed < 2**64.
    stream: 0 <= stream < 2**64, one number per task.
    index: 0 <= index < 2**64, the index of the example in the stream.
  """

  def __init__(self, seed: int, stream: int, index: int):
    counter = np.array([0, index, 0, 0], np.uint64)
    key = np.array([seed, stream], np.uint64)
    self._bits = np.random.Philox(counter=counter, key=key)
    self._words: list[int] = []

  def randbelow(self, n: int) -> int:
    """An integer in [0, n), with a bias below n / 2**64."""
    if not self._words:
      self._words = self._bits.random_raw(_WORDS).tolist()
    return self._words.pop() * n >> 64

  def randint(self, low: int, high: int) -> int:
    """An integer in [low, high]."""
    return low + self.randbelow(high - low + 1)

  def random_bool(self) -> bool:
    return self.randbelow(2) == 1

  def choice(self, items: Sequence[Item]) -> Item:
    return items[self.randbelow(len(items))]

  def sample(self, items: Sequence[Item], count: int) -> list[Item]:
    """`count` items at distinct indices, in random order."""
    pool = list(items)
    for i in range(count):
      j = i + self.randbelow(len(pool) - i)
      pool[i], pool[j] = pool[j], pool[i]
    return pool[:count]

  def shuffled(self, items: Sequence[Item]) -> list[Item]:
    return self.sample(items, len(items))
