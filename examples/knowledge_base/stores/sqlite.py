# SPDX-License-Identifier: Apache-2.0
"""The embedded store: one SQLite file, FTS5 for terms, numpy for vectors."""

import sqlite3
from collections.abc import Sequence

import numpy as np

from examples.knowledge_base.splitter import Passage, terms
from examples.knowledge_base.stores import Ranking, check_embeddings

_SCHEMA = """
CREATE TABLE IF NOT EXISTS model (name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS passages (
  id INTEGER PRIMARY KEY, source TEXT, title TEXT, text TEXT, vector BLOB);
CREATE VIRTUAL TABLE IF NOT EXISTS terms USING fts5(
  words, content='', tokenize='unicode61 remove_diacritics 0');
"""


class SqliteStore:
  """Implements `Store`. Vectors are compared with all, in memory."""

  def __init__(self, path: str, embeddings: str):
    """
    Args:
      path: a file, or ':memory:'.
      embeddings: the name of the model of the vectors.
    """
    try:
      self._db = sqlite3.connect(path, check_same_thread=False)
      self._db.executescript(_SCHEMA)
    except sqlite3.Error as error:
      raise ValueError(f'{path} is no store of passages: {error}') from None
    with self._db:
      if not (row := self._db.execute('SELECT name FROM model').fetchone()):
        row = (embeddings,)
        self._db.execute('INSERT INTO model VALUES (?)', row)
    check_embeddings(path, row[0], embeddings)
    self._matrix: np.ndarray | None = None

  def add(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
    start = len(self)
    ids = range(start, start + len(passages))
    with self._db:
      self._db.executemany(
        'INSERT INTO passages VALUES (?, ?, ?, ?, NULL)',
        [
          (i, p.source, p.title, p.text)
          for i, p in zip(ids, passages, strict=True)
        ],
      )
      self._db.executemany(
        'INSERT INTO terms (rowid, words) VALUES (?, ?)',
        [
          (i, ' '.join(terms(p.indexed)))
          for i, p in zip(ids, passages, strict=True)
        ],
      )
      self._add_vectors(ids, np.asarray(vectors, np.float32))

  def _add_vectors(self, ids: Sequence[int], vectors: np.ndarray) -> None:
    self._db.executemany(
      'UPDATE passages SET vector = ? WHERE id = ?',
      [
        (v.astype('<f4').tobytes(), i)
        for v, i in zip(vectors, ids, strict=True)
      ],
    )
    self._matrix = None

  def nearest(self, vector: np.ndarray, k: int) -> Ranking:
    if self._matrix is None:
      rows = self._db.execute('SELECT vector FROM passages ORDER BY id')
      data = b''.join(row[0] for row in rows)
      self._matrix = np.frombuffer(data, '<f4').reshape(-1, len(vector))
    scores = self._matrix @ np.asarray(vector, np.float32)
    best = np.arange(len(scores))
    if k < len(scores):
      best = np.argpartition(-scores, k - 1)[:k]
    best = best[np.lexsort((best, -scores[best]))]
    return list(zip(best.tolist(), scores[best].tolist(), strict=True))

  def match(self, words: Sequence[str], k: int) -> Ranking:
    query = ' OR '.join(f'"{word}"' for word in dict.fromkeys(words))
    if not query:
      return []
    rows = self._db.execute(
      'SELECT rowid, -bm25(terms) AS score FROM terms WHERE terms MATCH ? '
      'ORDER BY score DESC, rowid LIMIT ?',
      (query, k),
    )
    return rows.fetchall()

  def read(self, ids: Sequence[int]) -> list[Passage]:
    marks = ','.join('?' * len(ids))
    rows = self._db.execute(
      f'SELECT id, source, title, text FROM passages WHERE id IN ({marks})',
      [*ids],
    )
    passages = {row[0]: Passage(*row[1:]) for row in rows}
    return [passages[i] for i in ids]

  def __len__(self) -> int:
    return self._db.execute('SELECT count(*) FROM passages').fetchone()[0]

  def close(self) -> None:
    self._db.close()
