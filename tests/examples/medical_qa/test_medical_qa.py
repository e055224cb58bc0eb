# SPDX-License-Identifier: Apache-2.0
"""Leaflets are answered from and extracted; persons are sent to a doctor."""

import json

import pytest

pytest.importorskip('openai')

from examples.knowledge_base.search import Embedder  # noqa: E402
from examples.medical_qa import ask, evaluate, leaflets, triage  # noqa: E402
from moepeft.agent.chat_model import make_client  # noqa: E402
from tests.agent import scripted  # noqa: E402

from .. import hashing_server  # noqa: E402

FIELDS = dict.fromkeys(leaflets.Leaflet.model_fields, '')


@pytest.fixture(scope='module')
def server():
  def chat(body):
    return json.dumps(FIELDS) if 'response_format' in body else 'Keep it dry.'

  with hashing_server.serving(chat) as server:
    yield server


def test_leaflets_have_their_facts_and_questions():
  corpus = leaflets.leaflets(10, seed=3)
  assert len(corpus.files) == len(corpus.facts) == 10
  for question in corpus.sample(True, 30, seed=0):
    assert question.subject in question.text
    assert question.answer in question.sentence
    assert question.answer in corpus.facts[question.subject].values()
  for question in corpus.sample(False, 30, seed=0):
    assert not question.answer
  with pytest.raises(ValueError, match='there are 80 names'):
    leaflets.leaflets(81, seed=0)


def test_a_question_of_a_persons_health_is_referred(server):
  embed = Embedder(make_client(server.url), hashing_server.EMBEDDINGS)
  classify = triage.Triage(embed, ['Alvidol', 'Coritan'])
  # The words of examples, with a name in place of 'it'.
  assert classify('Should I stop taking Alvidol?') == 'doctor'
  assert classify('My child has swallowed the whole pack.') == 'emergency'
  assert classify('What is in Coritan?') == 'leaflet'


def test_held_out_questions_are_no_examples():
  for label, texts in evaluate.HELD_OUT.items():
    examples = {text.lower() for text in triage.EXAMPLES[label]}
    assert not {t.format(name='it').lower() for t in texts} & examples


def test_an_extraction_has_what_the_text_says_alone():
  draft = FIELDS | {'dose': 'two tablets', 'storage': 'in a cellar'}
  reply = scripted.text_reply(json.dumps(draft))
  with scripted.serving(reply) as script:
    leaflet = leaflets.extract(
      script.model(), 'Alvidol', 'The usual dose is two tablets.'
    )
  assert leaflet.model_dump() == FIELDS | {'dose': 'two tablets'}
  schema = script.requests[0]['response_format']['json_schema']['schema']
  assert set(schema['required']) == FIELDS.keys()


def test_the_command_refers_or_quotes(server, tmp_path, capsys):
  (tmp_path / 'alvidol.md').write_text(
    '# Alvidol\n\nIt is stored where it is dry.\n'
  )
  flags = [*server.flags(), f'--documents={tmp_path}', '--answer=quote']
  ask.main([*flags, 'Should I stop taking Alvidol?'])
  assert capsys.readouterr().out.strip() == triage.REPLIES['doctor']
  ask.main([*flags, '--threshold=0.2', 'Where is Alvidol stored?'])
  assert capsys.readouterr().out == (
    'It is stored where it is dry. [alvidol.md]\n'
  )
  ask.main([*flags, '--threshold=0.9', 'What is in Alvidol?'])
  assert capsys.readouterr().out == 'not in the documents\n'


def test_another_medicines_leaflet_gives_no_answer(server, tmp_path, capsys):
  (tmp_path / 'alvidol.md').write_text('# Alvidol\n\nIt is a tablet.\n')
  (tmp_path / 'coritan.md').write_text('# Coritan\n\nIt is stored dry.\n')
  flags = [*server.flags(), f'--documents={tmp_path}', '--answer=quote']
  ask.main([*flags, '--threshold=0.1', 'Where is Alvidol stored?'])
  assert capsys.readouterr().out == 'It is a tablet. [alvidol.md]\n'
  ask.main([*flags, '--threshold=0.1', 'Where is it stored?'])
  assert capsys.readouterr().out == 'not in the documents\n'


def test_the_evaluation_prints_its_tables(server, capsys):
  flags = ['--leaflets=5', '--questions=8', '--extractions=2']
  evaluate.main([*server.flags(), *flags])
  out = capsys.readouterr().out
  assert '| emergency | 6 |' in out and '| quote |' in out
  # The scripted model leaves every field empty.
  rows = [line.split(' | ') for line in out.splitlines() if '| dose' in line]
  assert rows and rows[0][1:3] == ['0', '0']
