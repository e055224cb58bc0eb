# SPDX-License-Identifier: Apache-2.0
"""Stores of passages with their vectors and terms.

sqlite.py (the default), faiss_store.py, milvus.py and postgres.py. A new one is
a file with a class that has the methods of `Store`, and a line in STORES.
"""

import importlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from examples.knowledge_base.splitter import Passage

# (id of a passage, score), the best first.
Ranking = list[tuple[int, float]]


class Store(Protocol):
  """Passages, numbered from 0 as they are added."""

  def add(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
    """Adds passages; `vectors` are float32 [n, d] of length one."""

  def nearest(self, vector: np.ndarray, k: int) -> Ranking:
    """The k passages of the largest cosine, exactly."""

  def match(self, words: Sequence[str], k: int) -> Ranking:
    """The k passages with any of the terms of the largest BM25."""

  def read(self, ids: Sequence[int]) -> list[Passage]:
    """The passages of ids, in their order."""

  def __len__(self) -> int:
    """The number of passages."""

  def close(self) -> None:
    """Closes files and connections."""


# {scheme of a URL: (module, class, packages)}; without a scheme it is SQLite.
STORES = {
  'sqlite': ('sqlite', 'SqliteStore', ''),
  'faiss': ('faiss_store', 'FaissStore', 'faiss-cpu'),
  'milvus': ('milvus', 'MilvusStore', "'pymilvus[milvus_lite]'"),
  'postgresql': ('postgres', 'PostgresStore', "'psycopg[binary]'"),
}


def open_store(url: str, embeddings: str) -> Store:
  """Opens a store, or makes an empty one.

  Args:
    url: a path, or ':memory:', for SQLite; 'faiss:PATH', 'milvus:PATH' or
      'postgresql://...'.
    embeddings: the name of the model of the vectors.

  Raises:
    ValueError: the store's vectors are of another model, it is damaged, or its
      package is not installed.
  """
  scheme, colon, path = url.partition(':')
  if not colon or scheme not in STORES:
    scheme, path = 'sqlite', url
  module, name, package = STORES[scheme]
  try:
    module = importlib.import_module(f'{__name__}.{module}')
  except ImportError as error:
    raise ValueError(
      f'--store={url} needs {error.name}: pip install {package}'
    ) from None
  location = url if path.startswith('//') else path
  return getattr(module, name)(location, embeddings)


def check_embeddings(url: str, stored: str, embeddings: str) -> None:
  """Raises a ValueError if the vectors of a store are of another model."""
  if stored != embeddings:
    raise ValueError(
      f'the vectors of {url} are of the model {stored!r}, not {embeddings!r}: '
      f'give --embeddings={stored}, or make another store'
    )
