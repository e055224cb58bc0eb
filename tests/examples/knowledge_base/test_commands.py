# SPDX-License-Identifier: Apache-2.0
"""The commands of the README, by a server of a test."""

import json

import pytest

pytest.importorskip('openai')
pytest.importorskip('networkx')

from examples.knowledge_base import (  # noqa: E402
  ask,
  benchmark,
  client,
  corpus,
  evaluate,
  index,
)

from .. import hashing_server  # noqa: E402


@pytest.fixture(scope='module')
def server():
  with hashing_server.serving(lambda body: 'It is 40 m high.') as server:
    yield server


@pytest.fixture
def documents(tmp_path):
  folder = tmp_path / 'documents'
  folder.mkdir()
  (folder / 'tower.md').write_text('# Tower\n\nIt is 40 m high. Storks nest.\n')
  (folder / 'mill.txt').write_text('The mill grinds rye.')
  return f'--documents={folder}'


def test_documents_are_asked_in_memory(server, documents, capsys):
  flags = [*server.flags(), documents, '--threshold=0.3']
  ask.main([*flags, 'How high is the tower, 40 m?'])
  assert capsys.readouterr().out == 'It is 40 m high. [tower.md]\n'
  ask.main([*flags, '--answer=quote', 'Does the mill grinds rye?'])
  assert capsys.readouterr().out == 'The mill grinds rye. [mill.txt]\n'
  ask.main([*flags, 'Who was the first emperor?'])
  assert capsys.readouterr().out == 'not in the documents\n'


@pytest.mark.parametrize('mode', ['graph', 'global'])
def test_modes_of_the_graph_cite_too(server, documents, capsys, mode):
  flags = [*server.flags(), documents, '--answer=quote', '--threshold=0.3']
  ask.main([*flags, f'--mode={mode}', 'Does the mill grinds rye?'])
  assert 'The mill grinds rye. [mill.txt]' in capsys.readouterr().out


def test_a_store_is_indexed_once_and_asked(server, documents, tmp_path, capsys):
  flags = [*server.flags(), f'--store={tmp_path / "kb.db"}']
  index.main([*flags, documents])
  assert capsys.readouterr().out.startswith('2 passages of 2 documents in ')
  ask.main([*flags, '--threshold=0.3', 'How high is it, 40 m?'])
  assert capsys.readouterr().out == 'It is 40 m high. [tower.md]\n'
  with pytest.raises(ValueError, match='already has 2 passages'):
    index.main([*flags, documents])
  with pytest.raises(ValueError, match='ask without --documents'):
    ask.main([*flags, documents, 'Why?'])


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['Why?'], 'nothing is indexed'),
    (['--mode=agent', '--answer=quote', 'Why?'], 'needs a chat model'),
    (['--mode=graph', '--rewrite', 'Why?'], '--rewrite is for'),
    (['--k=0', 'Why?'], '--k=0: expected 1 or more'),
  ],
)
def test_flags_that_do_not_fit_are_a_sentence(server, arguments, message):
  with pytest.raises(ValueError, match=message):
    ask.main([*server.flags(), *arguments])


def test_a_refusal_of_the_server_is_one_line(
  server, documents, capsys, monkeypatch
):
  flags = [
    'ask',
    f'--base_url={server.url}',
    '--embeddings=x',
    documents,
    'Why?',
  ]
  monkeypatch.setattr('sys.argv', flags)
  with pytest.raises(SystemExit):
    client.run(ask.main)
  error = capsys.readouterr().err
  assert error.startswith('error: the server refused the request (HTTP ')
  assert error.count('\n') == 1


def test_the_corpus_is_written_with_its_questions(tmp_path, capsys):
  corpus.main([f'--output={tmp_path}', '--documents=4'])
  assert capsys.readouterr().out.startswith('5 documents in ')
  lines = (tmp_path / 'questions.jsonl').read_text().splitlines()
  for row in map(json.loads, lines):
    if row['answer']:
      text = (tmp_path / row['source']).read_text()
      assert row['sentence'] in text and row['answer'] in row['sentence']


def test_recall_is_printed_as_a_table(server, capsys):
  flags = [*server.flags(), '--documents=4', '--questions=9', '--sizes=50']
  evaluate.main(flags)
  lines = capsys.readouterr().out.splitlines()
  # A head, a rule, and three searches.
  assert len(lines) == 2 + 3
  assert lines[0] == (
    '| size | passages | search | recall@1 | recall@3 | recall@5 '
    '| reranked, @1 | reranked, @3 | reranked, @5 |'
  )
  shares = [float(cell) for cell in lines[2].split('|')[4:-1]]
  assert len(shares) == 6 and all(0 <= share <= 1 for share in shares)


def test_answers_are_printed_as_a_table(server, capsys):
  flags = [*server.flags(), '--documents=4', '--questions=8']
  evaluate.main([*flags, '--table=answers'])
  out = capsys.readouterr().out
  assert 'threshold' in out and '| model, any support |' in out


def test_the_graphs_table_has_local_and_global_questions(server, capsys):
  evaluate.main([*server.flags(), '--documents=8', '--table=graph'])
  out = capsys.readouterr().out
  for question in ('local, recall@5', 'global, ships'):
    assert f'| {question} | hybrid |' in out
    assert f'| {question} | graph |' in out


def test_the_time_of_a_search_is_measured_and_plotted(tmp_path, capsys):
  path = tmp_path / 'latency.png'
  flags = ['--passages=50', '--questions=3', '--stores', 'sqlite']
  benchmark.main([*flags, f'--figure={path}'])
  assert '| sqlite | hybrid |' in capsys.readouterr().out
  assert path.read_bytes().startswith(b'\x89PNG')
