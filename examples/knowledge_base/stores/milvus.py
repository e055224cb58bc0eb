# SPDX-License-Identifier: Apache-2.0
"""Vectors in Milvus Lite beside a SQLite file with passages and terms.

Milvus's own BM25 has another idf than FTS5, so terms stay in SQLite.
"""

from collections.abc import Sequence

import numpy as np
from pymilvus import DataType, MilvusClient

from examples.knowledge_base.stores import Ranking
from examples.knowledge_base.stores.sqlite import SqliteStore

_COLLECTION = 'passages'


class MilvusStore(SqliteStore):
  """Implements `Store` in the files PATH and PATH.milvus.db."""

  def __init__(self, path: str, embeddings: str):
    super().__init__(path, embeddings)
    self._client = MilvusClient(f'{path}.milvus.db')

  def _add_vectors(self, ids: Sequence[int], vectors: np.ndarray) -> None:
    client = self._client
    if not client.has_collection(_COLLECTION):
      schema = client.create_schema()
      schema.add_field('id', DataType.INT64, is_primary=True)
      schema.add_field('vector', DataType.FLOAT_VECTOR, dim=vectors.shape[1])
      index = client.prepare_index_params()
      index.add_index('vector', index_type='FLAT', metric_type='IP')
      client.create_collection(_COLLECTION, schema=schema, index_params=index)
    for start in range(0, len(ids), 1000):
      client.insert(
        _COLLECTION,
        [
          {'id': i, 'vector': vector.tolist()}
          for i, vector in zip(
            ids[start : start + 1000],
            vectors[start : start + 1000],
            strict=True,
          )
        ],
      )

  def nearest(self, vector: np.ndarray, k: int) -> Ranking:
    if not len(self):
      return []
    query = np.asarray(vector, np.float32).tolist()
    (hits,) = self._client.search(
      _COLLECTION, [query], limit=k, consistency_level='Strong'
    )
    return [(hit['id'], hit['distance']) for hit in hits]

  def close(self) -> None:
    self._client.close()
    super().close()
