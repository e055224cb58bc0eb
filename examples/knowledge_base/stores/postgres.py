# SPDX-License-Identifier: Apache-2.0
"""Passages, vectors (pgvector) and terms in PostgreSQL.

PostgreSQL's ts_rank has no idf, so BM25 is computed in SQL, with the formula
and constants of SQLite's FTS5.
"""

import collections
import json
from collections.abc import Sequence

import numpy as np
import psycopg

from examples.knowledge_base.splitter import Passage, terms
from examples.knowledge_base.stores import Ranking, check_embeddings

_SCHEMA = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE IF NOT EXISTS model (name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS passages (
  id INT PRIMARY KEY, source TEXT, title TEXT, text TEXT, length INT,
  vector VECTOR);
CREATE TABLE IF NOT EXISTS terms (
  term TEXT, id INT, count INT, PRIMARY KEY (term, id));
"""
_BM25 = """
WITH totals AS (
  SELECT count(*)::float8 AS rows, avg(length)::float8 AS mean FROM passages),
hits AS (
  SELECT id, count, count(*) OVER (PARTITION BY term) AS df
  FROM terms WHERE term = ANY(%s))
SELECT id, sum(
  greatest(ln((rows - df + 0.5) / (df + 0.5)), 1e-6)
  * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / mean))) AS score
FROM hits JOIN passages USING (id), totals
GROUP BY id ORDER BY score DESC, id LIMIT %s
"""


class PostgresStore:
  """Implements `Store` in a database that has the extension pgvector."""

  def __init__(self, url: str, embeddings: str):
    try:
      self._db = psycopg.connect(url, autocommit=True)
      with self._db.transaction():
        self._db.execute(_SCHEMA)
        row = self._db.execute('SELECT name FROM model').fetchone()
        if not row:
          row = (embeddings,)
          self._db.execute('INSERT INTO model VALUES (%s)', row)
    except psycopg.Error as error:
      raise ValueError(f'{url} cannot be used: {error}') from None
    check_embeddings(url, row[0], embeddings)

  def add(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
    start = len(self)
    words = [terms(passage.indexed) for passage in passages]
    rows = (
      (i, p.source, p.title, p.text, len(w), _vector(v))
      for i, (p, w, v) in enumerate(
        zip(passages, words, vectors, strict=True), start
      )
    )
    counts = (
      (word, i, count)
      for i, w in enumerate(words, start)
      for word, count in collections.Counter(w).items()
    )
    with self._db.transaction(), self._db.cursor() as cursor:
      for table, values in (('passages', rows), ('terms', counts)):
        with cursor.copy(f'COPY {table} FROM STDIN') as copy:
          for row in values:
            copy.write_row(row)

  def nearest(self, vector: np.ndarray, k: int) -> Ranking:
    query = _vector(vector)
    return self._db.execute(
      'SELECT id, -(vector <#> %s::vector) AS score FROM passages '
      'ORDER BY score DESC, id LIMIT %s',
      (query, k),
    ).fetchall()

  def match(self, words: Sequence[str], k: int) -> Ranking:
    return self._db.execute(_BM25, ([*words], k)).fetchall()

  def read(self, ids: Sequence[int]) -> list[Passage]:
    rows = self._db.execute(
      'SELECT id, source, title, text FROM passages WHERE id = ANY(%s)',
      ([*ids],),
    )
    passages = {row[0]: Passage(*row[1:]) for row in rows}
    return [passages[i] for i in ids]

  def __len__(self) -> int:
    return self._db.execute('SELECT count(*) FROM passages').fetchone()[0]

  def close(self) -> None:
    self._db.close()


def _vector(vector: np.ndarray) -> str:
  return json.dumps(np.asarray(vector, np.float32).tolist())
