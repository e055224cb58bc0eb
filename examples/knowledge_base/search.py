# SPDX-License-Identifier: Apache-2.0
"""Searches a store: vectors, BM25, or both, and reranks what they return."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import openai

from examples.knowledge_base.splitter import Passage, split, terms
from examples.knowledge_base.stores import Ranking, Store
from moepeft.agent.chat_model import send

MODES = ('hybrid', 'vector', 'bm25')
# Reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009): its constant.
_RRF = 60
# Passages of each ranking that are fused, and of the fusion that are reranked.
_CANDIDATES = 30
_RERANKED = 15
_TEXTS_PER_REQUEST = 64


@dataclasses.dataclass(frozen=True)
class Hit:
  """A passage that a search returns, with its id and score in that search."""

  id: int
  passage: Passage
  score: float


class Embedder:
  """Embeds texts by an OpenAI API, as vectors of length one."""

  def __init__(self, client: openai.OpenAI, model: str):
    self.client, self.model = client, model
    self._cache: dict[str, np.ndarray] = {}

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """float32 [n, d] of n texts."""
    vectors = []
    for start in range(0, len(texts), _TEXTS_PER_REQUEST):
      batch = [*texts[start : start + _TEXTS_PER_REQUEST]]
      answer = send(
        self.client,
        lambda batch=batch: self.client.embeddings.create(
          model=self.model, input=batch
        ),
      )
      vectors += [row.embedding for row in answer.data]
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

  def cached(self, texts: Sequence[str]) -> np.ndarray:
    """The same for texts that are likely to be embedded again: sentences."""
    missing = [text for text in dict.fromkeys(texts) if text not in self._cache]
    if missing:
      self._cache |= zip(missing, self(missing), strict=True)
    return np.stack([self._cache[text] for text in texts])


# (query, hits) -> hits in a new order, with new scores.
Reranker = Callable[[str, Sequence[Hit]], list[Hit]]


@dataclasses.dataclass
class KnowledgeBase:
  """A store that is searched by texts.

  Attributes:
    store: the passages.
    embed: the model of their vectors.
    mode: a name of `MODES`.
    rerank: orders the best hits anew; None for no reranking.
  """

  store: Store
  embed: Embedder
  mode: str = 'hybrid'
  rerank: Reranker | None = None

  def add(self, documents, max_size: int, overlap: int) -> int:
    """Splits and indexes documents; the number of passages."""
    passages = [p for d in documents for p in split(d, max_size, overlap)]
    vectors = self.embed([passage.indexed for passage in passages])
    self.store.add(passages, vectors)
    return len(passages)

  def search(self, queries: str | Sequence[str], k: int) -> list[Hit]:
    """The k best passages for a query, or for several ways to put it.

    The first query is the one that hits are reranked for.
    """
    queries = [queries] if isinstance(queries, str) else queries
    rankings = []
    if self.mode != 'bm25':
      rankings += [
        self.store.nearest(vector, _CANDIDATES)
        for vector in self.embed.cached(queries)
      ]
    if self.mode != 'vector':
      rankings += [
        self.store.match(terms(query), _CANDIDATES) for query in queries
      ]
    ranking = rankings[0] if len(rankings) == 1 else fuse(rankings)
    return self.read(queries[0], ranking, k)

  def read(self, query: str, ranking: Ranking, k: int) -> list[Hit]:
    """The hits of a ranking of passages, reranked."""
    ranking = ranking[: max(k, _RERANKED) if self.rerank else k]
    passages = self.store.read([i for i, _ in ranking])
    hits = [
      Hit(i, passage, score)
      for (i, score), passage in zip(ranking, passages, strict=True)
    ]
    return self.rerank(query, hits)[:k] if self.rerank and hits else hits[:k]


def fuse(rankings: Sequence[Ranking]) -> Ranking:
  """Reciprocal rank fusion: ranks have one scale, scores do not."""
  scores: dict[int, float] = {}
  for ranking in rankings:
    for rank, (i, _) in enumerate(ranking, 1):
      scores[i] = scores.get(i, 0.0) + 1 / (_RRF + rank)
  return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def best_sentences(
  embed: Embedder, query: str, hits: Sequence[Hit]
) -> Mapping[int, tuple[str, float]]:
  """{index of a hit: its sentence nearest to the query, and the cosine}.

  A sentence is embedded with the title, as a passage is; headings do not count.
  """
  rows = [
    (index, sentence, f'{hit.passage.title}\n{sentence}')
    for index, hit in enumerate(hits)
    for sentence in hit.passage.text.splitlines()
    if not sentence.startswith('#')
  ]
  best: dict[int, tuple[str, float]] = {}
  if rows:
    vector = embed.cached([query])[0]
    scores = embed.cached([text for _, _, text in rows]) @ vector
    for (index, sentence, _), score in zip(rows, scores.tolist(), strict=True):
      if index not in best or score > best[index][1]:
        best[index] = sentence, score
  return best


def by_sentences(embed: Embedder) -> Reranker:
  """Reranks by a passage's best sentence: late interaction of sentences.

  ColBERT (Khattab and Zaharia, 2020) takes the maximum over tokens; an API
  gives vectors of texts. A passage of many subjects has a vector between them.
  """

  def rerank(query: str, hits: Sequence[Hit]) -> list[Hit]:
    best = best_sentences(embed, query, hits)
    scored = [
      dataclasses.replace(hit, score=best[i][1] if i in best else -1.0)
      for i, hit in enumerate(hits)
    ]
    return sorted(scored, key=lambda hit: (-hit.score, hit.id))

  return rerank


def by_likelihood(client: openai.OpenAI, model: str) -> Reranker:
  """Reranks by the probability of the query given a passage (UPR).

  Sachan et al., 2022. The server echoes the prompt's log-probabilities.
  """

  def rerank(query: str, hits: Sequence[Hit]) -> list[Hit]:
    scored = []
    for hit in hits:
      prompt = (
        f'Passage: {hit.passage.indexed}\n'
        'Write a question that this passage answers.\nQuestion:'
      )
      answer = send(
        client,
        lambda prompt=prompt: client.completions.create(
          model=model,
          prompt=f'{prompt} {query}',
          max_tokens=0,
          echo=True,
          logprobs=0,
        ),
      )
      logprobs = answer.choices[0].logprobs
      values = [
        logprob
        for logprob, offset in zip(
          logprobs.token_logprobs, logprobs.text_offset, strict=True
        )
        if offset >= len(prompt)
      ]
      scored.append(dataclasses.replace(hit, score=float(np.mean(values))))
    return sorted(scored, key=lambda hit: (-hit.score, hit.id))

  return rerank
