# SPDX-License-Identifier: Apache-2.0
"""Search fuses vectors and terms, reranks, and rewrites."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip('openai')

from examples.knowledge_base import answer as answer_lib  # noqa: E402
from examples.knowledge_base import corpus, evaluate, search  # noqa: E402
from examples.knowledge_base.loaders import Document  # noqa: E402
from examples.knowledge_base.search import Embedder, KnowledgeBase  # noqa: E402
from examples.knowledge_base.stores.sqlite import SqliteStore  # noqa: E402
from moepeft.agent.chat_model import ServerModel, make_client  # noqa: E402

from .. import hashing_server  # noqa: E402

DOCUMENTS = [
  Document('bridge.md', 'Bridge', 'It is 90 m long. It was built of oak.'),
  Document('tower.md', 'Tower', 'It is 40 m high. Storks nest on it.'),
  Document('mill.md', 'Mill', 'It grinds rye. Its wheel is of larch.'),
]


@pytest.fixture(scope='module')
def server():
  with hashing_server.serving(lambda body: 'How high is the Tower?') as server:
    yield server


@pytest.fixture
def base(server):
  embed = Embedder(make_client(server.url), hashing_server.EMBEDDINGS)
  base = KnowledgeBase(SqliteStore(':memory:', embed.model), embed)
  assert base.add(DOCUMENTS, 50, 0) == 3
  return base


def test_embeddings_are_the_servers_of_length_one(base):
  texts = ['One', 'two words'] * 40
  vectors = base.embed(texts)
  expected = [hashing_server.embed(text) for text in texts]
  np.testing.assert_allclose(vectors, expected, atol=1e-6)
  np.testing.assert_array_equal(base.embed.cached(texts[:2]), vectors[:2])


@pytest.mark.parametrize('mode', search.MODES)
def test_each_search_returns_the_passage_with_the_words(base, mode):
  base = dataclasses.replace(base, mode=mode)
  (hit,) = base.search('How high is the tower?', 1)
  assert hit.passage.source == 'tower.md'


def test_fusion_adds_the_reciprocals_of_ranks():
  # 7: 1/61 + 1/62; 5: 1/62 + 1/61, equal, so the lower id is first.
  ranking = search.fuse([[(7, 9.0), (5, 8.0)], [(5, 0.3), (7, 0.2), (1, 0.1)]])
  assert [i for i, _ in ranking] == [5, 7, 1]
  scores = [1 / 61 + 1 / 62, 1 / 61 + 1 / 62, 1 / 63]
  np.testing.assert_allclose([score for _, score in ranking], scores)


def test_reranking_orders_by_the_best_sentence(base):
  hits = base.search('Storks nest on it', 3)
  rerank = search.by_sentences(base.embed)
  best = rerank('Storks nest on it.', hits[::-1])[0]
  assert best.passage.source == 'tower.md'
  query, sentence = map(
    hashing_server.embed, ('Storks nest on it.', 'Tower\nStorks nest on it.')
  )
  assert best.score == pytest.approx(float(query @ sentence), abs=1e-5)


def test_likelihood_reranks_by_the_mean_logprob_of_the_query():
  def chat(body):
    prompt = body['prompt']
    start = prompt.rindex(' high')
    # The passage on the tower makes the query likely.
    value = -0.5 if 'Tower' in prompt else -2.0
    logprobs = {
      'tokens': ['...', ' high'],
      'token_logprobs': [None, value],
      'text_offset': [0, start],
      'top_logprobs': None,
    }
    choice = {'index': 0, 'text': prompt, 'logprobs': logprobs}
    choice['finish_reason'] = 'length'
    return {'id': 'x', 'object': 'text_completion', 'choices': [choice]}

  with hashing_server.serving(chat) as server:
    client = make_client(server.url)
    rerank = search.by_likelihood(client, 'scripted')
    hits = [
      search.Hit(i, passage, 0.0)
      for i, document in enumerate(DOCUMENTS)
      for passage in search.split(document, 50, 0)
    ]
    first, *rest = rerank('high', hits)
  assert (first.passage.source, first.score) == ('tower.md', -0.5)
  assert [hit.score for hit in rest] == [-2.0, -2.0]
  assert server.requests[0]['echo'] and server.requests[0]['max_tokens'] == 0


def test_a_rewritten_question_is_searched_for_beside_it(server, base):
  model = ServerModel(make_client(server.url), 'scripted', stream=False)
  history = [
    {'role': 'user', 'content': 'Tell me of the tower.'},
    {'role': 'assistant', 'content': 'Storks nest on it.'},
    {'role': 'user', 'content': 'Height?'},
  ]
  queries = answer_lib.rewrite(model, history)
  assert queries == ['Height?', 'How high is the Tower?']
  prompt = server.requests[-1]['messages'][0]['content']
  assert 'assistant: Storks nest on it.\nuser: Height?' in prompt
  hits = base.search(queries, 1)
  assert hits[0].passage.source == 'tower.md'


def test_recall_counts_the_sentence_in_its_document(base):
  sentence = DOCUMENTS[1].text.split('. ')[0] + '.'
  question = corpus.Question('How high?', '40 m', sentence, 'tower.md')
  hits = base.search('tower', 3)
  assert evaluate.is_recalled(question, hits)
  misplaced = dataclasses.replace(question, source='mill.md')
  assert not evaluate.is_recalled(misplaced, hits)


def test_hybrid_search_recalls_most_of_a_generated_corpus(base, tmp_path):
  stations = corpus.stations(12, seed=1)
  base = evaluate.index(stations, tmp_path, base.embed, 100, 20)
  questions = stations.sample(True, 60, seed=0)
  at_1, at_3, at_5 = evaluate.recall(base, questions)
  assert at_1 <= at_3 <= at_5
  # A hash knows no synonyms, but all documents' titles.
  assert at_5 > 0.5
