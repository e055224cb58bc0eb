# SPDX-License-Identifier: Apache-2.0
"""Classifies texts by their nearest examples."""

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from examples.knowledge_base.search import Embedder


class ExampleClassifier:
  """Labels a text as its k nearest examples vote, weighted by the cosine."""

  def __init__(
    self, embed: Embedder, examples: Mapping[str, Sequence[str]], k: int = 5
  ):
    """`examples`: {label: texts}."""
    self._embed, self._k = embed, k
    self._labels = [name for name, texts in examples.items() for _ in texts]
    self._vectors = embed(
      [text for texts in examples.values() for text in texts]
    )

  def __call__(self, text: str) -> tuple[str, float]:
    """(label, cosine of its nearest example)."""
    cosines = self._vectors @ self._embed.cached([text])[0]
    votes: dict[str, float] = collections.defaultdict(float)
    nearest: dict[str, float] = {}
    for i in np.argsort(-cosines, kind='stable')[: self._k]:
      votes[self._labels[i]] += float(cosines[i])
      nearest.setdefault(self._labels[i], float(cosines[i]))
    label = max(votes, key=lambda name: votes[name])
    return label, nearest[label]
