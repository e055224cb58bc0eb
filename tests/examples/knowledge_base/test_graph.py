# SPDX-License-Identifier: Apache-2.0
"""The graph connects passages by names, and the agent searches by itself."""

import pytest

pytest.importorskip('openai')
pytest.importorskip('networkx')

from examples.knowledge_base import corpus, evaluate  # noqa: E402
from examples.knowledge_base.agentic import AgenticSearch  # noqa: E402
from examples.knowledge_base.answer import NOT_IN_DOCUMENTS  # noqa: E402
from examples.knowledge_base.graph import PassageGraph, entities  # noqa: E402
from examples.knowledge_base.search import Embedder, KnowledgeBase  # noqa: E402
from examples.knowledge_base.splitter import Passage  # noqa: E402
from examples.knowledge_base.stores.sqlite import SqliteStore  # noqa: E402
from moepeft.agent.chat_model import make_client  # noqa: E402
from tests.agent import scripted  # noqa: E402

from .. import hashing_server  # noqa: E402

PASSAGES = [
  Passage('a.md', 'Balanda', 'Fuel is brought by the ship Keluma.'),
  Passage('b.md', 'Keluma', 'Her home port is Dunmere.'),
  Passage('c.md', 'Norona', 'Her home port is Eastvig.'),
  Passage('d.md', 'Pelimar', 'Fuel is brought by the ship Norona.'),
]
QUESTION = 'In which harbour is the ship based that supplies Balanda?'


@pytest.fixture(scope='module')
def base():
  with hashing_server.serving(lambda body: '') as server:
    embed = Embedder(make_client(server.url), hashing_server.EMBEDDINGS)
    base = KnowledgeBase(SqliteStore(':memory:', embed.model), embed)
    base.store.add(PASSAGES, embed([p.indexed for p in PASSAGES]))
    yield base


def test_entities_are_names_within_sentences_and_titles():
  assert entities(PASSAGES[0]) == {'balanda', 'keluma'}


def test_a_passage_two_steps_away_is_before_one_that_looks_the_same(base):
  ranking = [i for i, _ in PassageGraph(base).rank(QUESTION)]
  assert ranking[:2] == [0, 1]
  hits = PassageGraph(base).local_search(QUESTION, 2)
  assert {hit.passage.source for hit in hits} == {'a.md', 'b.md'}


def test_communities_part_the_passages(base):
  graph = PassageGraph(base)
  assert sorted(i for group in graph.communities for i in group) == [*range(4)]
  assert {0, 1} in graph.communities and {2, 3} in graph.communities
  hits = list(graph.global_search('Which harbours are used?'))
  assert len(hits) == 2 and all(len(group) == 1 for group in hits)


def test_two_hops_need_the_ships_document(base, tmp_path):
  stations = corpus.stations(16, seed=2)
  indexed = evaluate.index(stations, tmp_path, base.embed, 60, 0)
  questions = corpus.two_hops(stations)
  assert len(questions) == 16
  graph = PassageGraph(indexed)
  by_graph = sum(
    evaluate.is_recalled(q, graph.local_search(q.text, 10)) for q in questions
  )
  by_words = sum(
    evaluate.is_recalled(q, indexed.search(q.text, 10)) for q in questions
  )
  assert by_graph > by_words


def test_the_agent_searches_twice_and_cites(base):
  replies = [
    scripted.wants(('search', {'query': 'ship that supplies Balanda'})),
    scripted.wants(('search', {'query': 'home port of Keluma'})),
    scripted.text_reply('The home port is Dunmere [1].'),
  ]
  with scripted.serving(*replies) as script:
    result = AgenticSearch(base, script.model(), k=2).ask(QUESTION)
  assert str(result) == 'The home port is Dunmere. [b.md]'
  output = script.requests[1]['messages'][-1]['content']
  assert 'Fuel is brought by the ship Keluma.' in output


@pytest.mark.parametrize(
  'text', ['It is Aldersund [1].', 'It is Dunmere [77].']
)
def test_an_answer_without_support_is_none(base, text):
  replies = [
    scripted.wants(('search', {'query': 'port'})),
    scripted.text_reply(text),
  ]
  with scripted.serving(*replies) as script:
    result = AgenticSearch(base, script.model(), k=4).ask(QUESTION)
  assert (result.text, result.draft) == (NOT_IN_DOCUMENTS, text)


def test_a_greeting_needs_no_search(base):
  with scripted.serving(scripted.text_reply('Good morning!')) as script:
    result = AgenticSearch(base, script.model()).ask('Hello')
  assert (result.text, result.citations) == ('Good morning!', ())
