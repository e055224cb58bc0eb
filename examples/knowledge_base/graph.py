# SPDX-License-Identifier: Apache-2.0
"""Searches a graph of passages and the entities that they name.

Local questions start from the question's entities, by personalized PageRank as
in HippoRAG (Gutierrez et al., 2024): passages that share an entity with those
of the question are near, also if they share no word with the question. Global
questions go to every community of the graph, as in GraphRAG (Edge et al.,
2024), so that an answer covers all of the documents.
"""

import collections
import re
from collections.abc import Iterator

from examples.knowledge_base.search import (
  Hit,
  KnowledgeBase,
  by_sentences,
  fuse,
)
from examples.knowledge_base.splitter import Passage
from examples.knowledge_base.stores import Ranking

_NAME = re.compile(r'[A-Z][\w-]{2,}')
# A name in more passages than this share is a word of the field, no entity.
_MAX_SHARE = 0.2
# Passages near the question's entities that are compared with it.
_NEIGHBOURS = 30


def entities(passage: Passage) -> set[str]:
  """Names in a passage: capitalized words of its title and in sentences.

  A sentence's first word does not count. Scripts without capital letters have
  none; replace this function by a model's extraction for them.
  """
  texts = [passage.title]
  texts += [text.partition(' ')[2] for text in passage.text.splitlines()]
  return {name.lower() for text in texts for name in _NAME.findall(text)}


class PassageGraph:
  """A graph with an edge between each passage and each entity in it.

  Attributes:
    graph: nodes are ids of passages and names of entities.
    communities: sets of passages' ids, the largest first.
  """

  def __init__(self, base: KnowledgeBase, seed: int = 0):
    """`seed`: of the search for communities.

    Raises:
      ValueError: networkx is not installed.
    """
    try:
      import networkx
    except ImportError:
      raise ValueError(
        'a graph of passages needs networkx: pip install networkx'
      ) from None

    self._base = base
    ids = range(len(base.store))
    names = dict(zip(ids, map(entities, base.store.read(ids)), strict=True))
    counts = collections.Counter(n for group in names.values() for n in group)
    limit = max(_MAX_SHARE * len(ids), 2)
    self.graph = networkx.Graph()
    self.graph.add_nodes_from(ids)
    self.graph.add_weighted_edges_from(
      (i, name, 1 / counts[name])
      for i, group in names.items()
      for name in sorted(group)
      if counts[name] <= limit
    )
    # A name in one passage alone connects nothing.
    shared = self.graph.subgraph(
      node
      for node in self.graph
      if isinstance(node, int) or self.graph.degree(node) > 1
    )
    groups = networkx.community.louvain_communities(shared, seed=seed)
    passages = ({node for node in g if isinstance(node, int)} for g in groups)
    self.communities = sorted(
      filter(None, passages), key=lambda g: (-len(g), min(g))
    )

  def local_search(self, question: str, k: int) -> list[Hit]:
    """The k best passages near the question's entities.

    Documents are ranked by their nearness in the graph and by their sentence
    most like the question, fused. A question without an entity is searched for
    as any other.
    """
    if not (ranking := self.rank(question)):
      return self._base.search(question, k)
    hits = by_sentences(self._base.embed)(question, self._read(ranking))
    best: dict[str, Hit] = {}
    for hit in hits:
      best.setdefault(hit.passage.source, hit)
    # Passages of the question's own subject are nearest: one of each document,
    # so that they leave room for those of others.
    near = dict.fromkeys(hit.passage.source for hit in self._read(ranking))
    by_graph = [(best[source].id, 0.0) for source in near]
    by_likeness = [(hit.id, hit.score) for hit in best.values()]
    firsts = fuse([by_graph, by_likeness])
    rest = {hit.id for hit in hits} - {i for i, _ in firsts}
    remaining = [(hit.id, 0.0) for hit in hits if hit.id in rest]
    return self._read([*firsts, *remaining][:k])

  def rank(self, question: str) -> Ranking:
    """Passages by PageRank from the question's entities; [] without any."""
    import networkx

    # In a question without capital letters, any word may be a name.
    words = _NAME.findall(question.partition(' ')[2]) or question.split()
    seeds = {
      name: 1 / self.graph.degree(name)
      for word in words
      if (name := word.lower().strip('?.,!')) in self.graph
    }
    if not seeds:
      return []
    scores = networkx.pagerank(self.graph, personalization=seeds, nstart=seeds)
    ranking = [
      (i, s) for i, s in scores.items() if isinstance(i, int) and s > 0
    ]
    return sorted(ranking, key=lambda row: (-row[1], row[0]))[:_NEIGHBOURS]

  def global_search(self, question: str, k: int = 1) -> Iterator[list[Hit]]:
    """Yields each community's k passages that are nearest to a question."""
    base = self._base
    vector = base.embed.cached([question])[0]
    ranking = base.store.nearest(vector, len(base.store))
    for group in self.communities:
      yield self._read([row for row in ranking if row[0] in group][:k])

  def _read(self, ranking: Ranking) -> list[Hit]:
    passages = self._base.store.read([i for i, _ in ranking])
    return [
      Hit(i, passage, score)
      for (i, score), passage in zip(ranking, passages, strict=True)
    ]
