# SPDX-License-Identifier: Apache-2.0
"""Vectors in a FAISS index beside a SQLite file with passages and terms.

The index is exact, IndexFlatIP; FAISS's approximate ones have the same methods.
"""

import pathlib
from collections.abc import Sequence

import faiss
import numpy as np

from examples.knowledge_base.stores import Ranking
from examples.knowledge_base.stores.sqlite import SqliteStore


class FaissStore(SqliteStore):
  """Implements `Store` in the files PATH and PATH.faiss."""

  def __init__(self, path: str, embeddings: str):
    super().__init__(path, embeddings)
    self._file = pathlib.Path(f'{path}.faiss')
    exists = path != ':memory:' and self._file.exists()
    self._index = faiss.read_index(str(self._file)) if exists else None
    count = self._index.ntotal if exists else 0
    if count != len(self):
      raise ValueError(
        f'{self._file} has {count} vectors of {len(self)} passages in {path}: '
        'delete both, and index the documents again'
      )

  def _add_vectors(self, ids: Sequence[int], vectors: np.ndarray) -> None:
    if self._index is None:
      self._index = faiss.IndexFlatIP(vectors.shape[1])
    # Vectors have the numbers of their rows, as passages do.
    self._index.add(vectors)
    if self._file.name != ':memory:.faiss':
      faiss.write_index(self._index, str(self._file))

  def nearest(self, vector: np.ndarray, k: int) -> Ranking:
    if self._index is None:
      return []
    query = np.asarray(vector, np.float32)[None]
    scores, ids = self._index.search(query, min(k, self._index.ntotal))
    return list(zip(ids[0].tolist(), scores[0].tolist(), strict=True))
