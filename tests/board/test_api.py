# SPDX-License-Identifier: Apache-2.0
"""The board's API: what it shows of runs, what it starts, what it refuses."""

import json
import os
import shlex
import sys

import pytest
from fastapi.testclient import TestClient

from moepeft.board.__main__ import read_api_keys
from moepeft.board.app import EXPORTS, Board, make_app
from moepeft.board.folders import Folders
from moepeft.core.http_access import ApiKeys
from moepeft.runs.directory import open_workdir
from tests.board.planted import SITES, make_run, row

HOSTS = ('localhost', '127.0.0.1')
TINY = {'method': 'molora(experts=3, rank=2)', 'steps': '4', 'batch_size': '2'}


@pytest.fixture
def board(tmp_path, monkeypatch):
  """A board whose processes are recorded and not started."""
  value = Board(Folders(str(tmp_path / 'runs')))
  value.started = []
  monkeypatch.setattr(
    value.jobs,
    'start',
    lambda run, kind, command: value.started.append((run, kind, command)),
  )
  return value


@pytest.fixture
def client(board):
  app = make_app(board, ApiKeys(), HOSTS)
  return TestClient(app, base_url='http://127.0.0.1:7860')


def refusal(reply, status=400):
  assert reply.status_code == status, reply.text
  message = reply.json()['error']['message']
  assert len(message.splitlines()) == 1
  return message


def test_a_run_is_a_row_with_its_last_values(client, tmp_path):
  make_run(tmp_path / 'runs' / 'a')
  with open_workdir(str(tmp_path / 'runs' / 'a')):
    (run,) = client.get('/api/runs').json()['runs']
  assert (run['name'], run['state'], run['step'], run['steps']) == (
    *('a', 'running', 5, 8),
  )
  # Three steps are left, and two take a second.
  assert run['eta'] == 1.5
  assert (run['loss'], run['validation_loss']) == (3 / 5, 1.25)
  assert run['method'] == 'molora(experts=3, rank=2)'
  (run,) = client.get('/api/runs').json()['runs']
  assert run['state'] == 'stopped' and 'eta' not in run
  (tmp_path / 'runs' / 'a' / 'summary.json').write_text('{}')
  assert client.get('/api/runs').json()['runs'][0]['state'] == 'finished'


def test_a_row_that_is_being_written_is_not_read(client, tmp_path):
  run = make_run(tmp_path / 'runs' / 'a')
  with open(run / 'metrics.jsonl', 'a') as file:
    file.write(json.dumps(row(6)) + '\n' + json.dumps(row(7))[:20])
  assert client.get('/api/runs').json()['runs'][0]['step'] == 6
  curves = client.get('/api/curves?name=a').json()['curves']
  assert curves['loss'][0] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_run_is_a_sentence_and_hides_no_other(client, tmp_path):
  make_run(tmp_path / 'runs' / 'a')
  make_run(tmp_path / 'runs' / 'b')
  (tmp_path / 'runs' / 'a' / 'config.json').write_text('{"steps": []}')
  runs = {run['name']: run for run in client.get('/api/runs').json()['runs']}
  assert runs['a']['state'] == 'damaged'
  assert 'config.json is damaged' in runs['a']['error']
  assert runs['b']['state'] == 'stopped'
  assert client.get('/api/run?name=a').json()['state'] == 'damaged'


def test_details_have_settings_that_differ(client, tmp_path):
  make_run(tmp_path / 'runs' / 's' / 'runs' / 'a', seed=7)
  run = client.get('/api/run', params={'name': 's/runs/a'}).json()
  assert run['config'] == {
    'seed': '7',
    'steps': '8',
    'method': 'molora(experts=3, rank=2)',
  }
  assert (run['checkpoint'], run['exports'], run['log']) == (None, [], '')


def test_curves_and_routers_are_those_of_the_log(client, tmp_path):
  make_run(tmp_path / 'runs' / 'a')
  data = client.get('/api/curves?name=a').json()
  assert data['curves']['loss'] == [
    [1, 2, 3, 4, 5],
    [3.0, 1.5, 1.0, 0.75, 0.6],
  ]
  assert data['curves']['validation_loss'] == [[5], [1.25]]
  assert {site['path'] for site in data['sites']} == {*SITES}
  query = {'name': 'a', 'site': SITES[0]}
  router = client.get('/api/routing', params=query).json()
  assert router['steps'] == [1, 2, 3, 4, 5]
  assert router['shares'][-1] == [[0.5, 0.3, 0.2], [0.5, 0.5, 0.0]]
  assert router['entropy'][-1] == [1.0, 0.5]
  assert router['dead'] == [[False] * 3, [False, False, True]]
  assert router['dead_counts'] == [1] * 5
  message = refusal(client.get('/api/routing?name=a&site=x'))
  assert "no log of a router at 'x'" in message


def test_experts_by_task_come_from_the_report(client, tmp_path):
  run = make_run(tmp_path / 'runs' / 'a')
  assert 'not measured' in refusal(client.get('/api/tasks?name=a'))
  report = {
    'run': {'step': 5},
    'tasks': ['stars'],
    'sites': [
      {'path': 'p', 'name': 'n', 'counts': [2], 'by_task': [[[0.75, 0.25]]]}
    ],
  }
  (run / 'routing').mkdir()
  (run / 'routing' / 'index.html').write_text(
    '<script type="application/json" id="data">'
    f'{json.dumps(report)}</script><script>1</script>'
  )
  tasks = client.get('/api/tasks?name=a').json()
  assert (tasks['step'], tasks['tasks']) == (5, ['stars'])
  assert tasks['sites'][0]['by_task'] == [[[0.75, 0.25]]]
  assert client.get('/api/run?name=a').json()['report']


def test_a_report_opens_by_a_link_that_reaches_no_api(client, tmp_path):
  run = make_run(tmp_path / 'runs' / 'a')
  (run / 'routing').mkdir()
  (run / 'routing' / 'index.html').write_text('<p>report')
  url = client.post('/api/report', json={'name': 'a'}).json()['url']
  reply = client.get(f'/{url}')
  assert reply.text == '<p>report'
  policy = reply.headers['content-security-policy']
  # An origin of its own: no storage and no requests of the board.
  assert 'sandbox allow-scripts;' in policy and 'same-origin' not in policy
  assert 'expired' in refusal(client.get('/report/x'), 404)


def test_a_form_is_shown_as_config_and_command(client, board, tmp_path):
  body = {'name': 'new', 'settings': TINY}
  checked = client.post('/api/check', json=body).json()
  assert "  c.method = 'molora(experts=3, rank=2)'\n" in checked['config']
  words = shlex.split(checked['command'])
  assert words[:2] == ['-m', 'moepeft.train']
  assert words[3] == f'--workdir={tmp_path}/runs/new'
  # Nothing is written before the start.
  assert not (tmp_path / 'runs').exists() and board.started == []


def test_a_start_writes_the_config_that_was_shown(client, board, tmp_path):
  body = {'name': 'new', 'settings': TINY}
  checked = client.post('/api/check', json=body).json()
  assert client.post('/api/start', json=body).status_code == 200
  ((run, kind, command),) = board.started
  assert (run, kind) == ('new', 'train')
  assert command == [sys.executable, *shlex.split(checked['command'])]
  card = command[3].removeprefix('--config=')
  with open(card) as file:
    assert file.read() == checked['config']
  assert os.path.isdir(tmp_path / 'runs' / 'new')
  # It is listed before its process has written anything.
  (row_of_run,) = client.get('/api/runs').json()['runs']
  assert (row_of_run['name'], row_of_run['step']) == ('new', 0)


@pytest.mark.parametrize(
  ('settings', 'sentence'),
  [
    ({'stepz': '3'}, 'did you mean config.steps?'),
    ({'steps': '-1'}, 'config.steps'),
    ({'method': 'molara(rank=2)'}, 'molora'),
    ({'method': 'lora(rank=2'}, 'lora(rank=2'),
    ({'objective': 'sft'}, 'config.objective'),
    ({'data.path': '/etc/passwd'}, 'outside of the folders'),
    ({'model.path': 'package:nothing'}, "ships no 'nothing'"),
    ({'imports': 'os'}, 'cannot be set on the board'),
    ({'preference.beta': '2'}, 'does nothing with'),
    ({'budget': 'many'}, 'a budget is written like'),
  ],
)
@pytest.mark.parametrize('route', ['check', 'start'])
def test_a_bad_form_is_one_sentence_and_starts_nothing(
  client, board, settings, sentence, route
):
  body = {'name': 'new', 'settings': settings}
  assert sentence in refusal(client.post(f'/api/{route}', json=body))
  assert board.started == []
  assert client.get('/api/runs').json()['runs'] == []


def test_a_run_is_resumed_with_its_own_config(client, board, tmp_path):
  make_run(tmp_path / 'runs' / 's' / 'a', seed=7)
  assert client.post('/api/resume', json={'name': 's/a'}).status_code == 200
  ((_, _, command),) = board.started
  assert command[1:3] == ['-m', 'moepeft.train']
  assert command[4] == f'--workdir={tmp_path}/runs/s/a'
  with open(command[3].removeprefix('--config=')) as file:
    assert '  c.seed = 7\n' in file.read()


def test_a_config_in_a_run_s_directory_is_not_run(client, board, tmp_path):
  run = make_run(tmp_path / 'runs' / 'a')
  for name in ('config.py', 'a.py'):
    (run / name).write_text('raise SystemExit')
  client.post('/api/resume', json={'name': 'a'})
  ((_, _, command),) = board.started
  assert f'{os.sep}.board{os.sep}' in command[3]


@pytest.mark.parametrize('route', ['resume', 'export', 'routing', 'chat'])
def test_a_run_whose_paths_lead_elsewhere_is_not_opened(
  client, board, tmp_path, route
):
  make_run(tmp_path / 'runs' / 'a', **{'model.path': '/etc'})
  body = {'name': 'a'} | ({'format': 'hf'} if route == 'export' else {})
  reply = client.post(f'/api/{route}', json=body)
  assert 'config.model.path' in refusal(reply)
  assert board.started == []


@pytest.mark.parametrize('export_format', EXPORTS)
def test_exports_go_below_the_run(client, board, tmp_path, export_format):
  run = make_run(tmp_path / 'runs' / 'a')
  body = {'name': 'a', 'format': export_format}
  assert client.post('/api/export', json=body).status_code == 200
  ((name, kind, command),) = board.started
  assert (name, kind) == ('a', 'export')
  assert command[1:] == [
    *('-m', 'moepeft.convert', f'--workdir={run}'),
    *(f'--output={run}/export/{export_format}', f'--to={export_format}'),
    '--overwrite',
  ]


def test_the_routing_is_measured_below_the_run(client, board, tmp_path):
  run = make_run(tmp_path / 'runs' / 'a')
  client.post('/api/routing', json={'name': 'a'})
  assert board.started[0][2][1:] == [
    *('-m', 'moepeft.routing', str(run), f'--output={run}/routing'),
  ]


def test_a_chat_server_has_a_secret_key_on_loopback(client, board, tmp_path):
  run = make_run(tmp_path / 'runs' / 'a')
  message = refusal(client.post('/api/chat', json={'name': 'a'}))
  assert 'no checkpoint yet' in message
  (run / 'checkpoints' / '5').mkdir(parents=True)
  assert client.post('/api/chat', json={'name': 'a'}).status_code == 200
  ((_, kind, command),) = board.started
  assert kind == 'chat' and '--host=127.0.0.1' in command
  assert f'--adapter=run={run}' in command
  (path,) = (c.partition('=')[2] for c in command if 'api_key_file' in c)
  assert os.stat(path).st_mode & 0o777 == 0o600
  with open(path) as file:
    key = file.read().strip()
  assert len(key) > 30 and key not in ' '.join(command)
  state = client.get('/api/chat?name=a').json()
  assert (state['running'], state['ready'], state['chats']) == (
    *(False, False, False),
  )


def test_a_question_without_a_server_is_a_sentence(client, tmp_path):
  make_run(tmp_path / 'runs' / 'a')
  body = {'name': 'a', 'model': 'run'}
  body['messages'] = [{'role': 'user', 'content': 'x'}]
  assert 'not loaded' in refusal(client.post('/api/ask', json=body), 503)


@pytest.mark.parametrize(
  ('route', 'body'),
  [
    ('start', {'name': 'a', 'settings': {}, 'flags': ['--x']}),
    ('start', {'name': 'a', 'settings': {'steps': 3}}),
    ('export', {'name': 'a', 'format': '../x'}),
    ('export', {'name': 'a', 'format': 'gguf'}),
    ('stop', {'name': 'a', 'kind': '../x'}),
    ('stop', {'name': 'a', 'kind': 'train', 'pid': 1}),
    ('ask', {'name': 'a', 'model': 'other', 'messages': []}),
    ('resume', {}),
  ],
)
def test_a_request_has_no_other_fields_and_values(client, board, route, body):
  refusal(client.post(f'/api/{route}', json=body))
  assert board.started == []


@pytest.mark.parametrize('name', ['../x', '/etc', '.board', 'no', ''])
def test_names_that_are_no_run_are_refused_everywhere(client, board, name):
  for route in ('resume', 'routing', 'chat', 'report'):
    message = refusal(client.post(f'/api/{route}', json={'name': name}))
    assert 'there is no run' in message
  for route in ('run', 'curves', 'routing', 'tasks', 'chat'):
    reply = client.get(f'/api/{route}', params={'name': name})
    assert 'there is no run' in refusal(reply)
  assert board.started == []


def test_a_page_of_another_site_reaches_nothing(client, board):
  body = {'name': 'new', 'settings': TINY}
  # DNS rebinding: the name is foreign, the address is this machine's.
  headers = {'Host': 'evil.example:7860'}
  for path in ('/', '/api/runs'):
    assert 'evil.example' in refusal(client.get(path, headers=headers), 403)
  # A form or a script of another site.
  for origin in ('http://evil.example', 'null', 'http://127.0.0.1:8000'):
    reply = client.post('/api/start', json=body, headers={'Origin': origin})
    refusal(reply, 403)
  # What a form can send without asking first.
  headers = {'Content-Type': 'text/plain'}
  reply = client.post('/api/start', content=json.dumps(body), headers=headers)
  assert 'application/json' in refusal(reply)
  assert board.started == []
  headers = {'Origin': 'http://127.0.0.1:7860'}
  assert client.post('/api/start', json=body, headers=headers).is_success


def test_with_keys_only_the_page_is_shown_without_one(board, tmp_path):
  make_run(tmp_path / 'runs' / 'a')
  app = make_app(board, ApiKeys((b'secret',)), ())
  client = TestClient(app, base_url='http://box:7860')
  assert client.get('/').status_code == 200
  for path in ('/api/runs', '/api/run?name=a', '/nothing'):
    assert 'key is missing or wrong' in refusal(client.get(path), 401)
    wrong = {'Authorization': 'Bearer secre'}
    refusal(client.get(path, headers=wrong), 401)
  assert client.post('/api/resume', json={'name': 'a'}).status_code == 401
  assert board.started == []
  right = {'Authorization': 'Bearer secret'}
  assert client.get('/api/runs', headers=right).status_code == 200


def test_the_page_loads_nothing_from_elsewhere(client):
  reply = client.get('/')
  policy = reply.headers['content-security-policy']
  assert "default-src 'none'" in policy and "connect-src 'self'" in policy
  assert "frame-ancestors 'none'" in policy and 'unsafe' not in policy
  assert reply.headers['x-content-type-options'] == 'nosniff'
  page = reply.text.replace('http://www.w3.org/2000/svg', '')
  assert 'http' not in page.replace('http-equiv', '')


def test_the_page_says_all_in_both_languages(client):
  page = client.get('/').text
  words = page.partition('id="words">')[2].partition('</script>')[0]
  words = json.loads(words)
  assert words['en'].keys() == words['zh'].keys()
  for key, english in words['en'].items():
    names = {part for part in english.split('{')[1:]}
    names = {part.partition('}')[0] for part in names}
    assert all(f'{{{name}}}' in words['zh'][key] for name in names), key


def test_data_is_shown_with_what_is_trained(client):
  body = {'settings': {**TINY, 'data.tasks': 'stars'}}
  examples = client.post('/api/preview', json=body).json()['examples']
  (inputs, first), (targets, second) = examples[0]['spans']
  assert (first, second) == (False, True)
  assert inputs and targets.endswith('<eos>')
  assert 0 < examples[0]['trained'] < examples[0]['tokens']


def test_data_that_is_not_there_is_a_sentence(client, tmp_path):
  path = str(tmp_path / 'runs' / 'rows.jsonl')
  body = {'settings': {'data.source': 'jsonl', 'data.path': path}}
  assert 'rows.jsonl' in refusal(client.post('/api/preview', json=body))


def test_other_machines_reach_no_board_without_keys(tmp_path):
  with pytest.raises(ValueError, match='--api_key_file'):
    read_api_keys('0.0.0.0', '')
  assert read_api_keys('127.0.0.1', '') == ApiKeys()
  (tmp_path / 'keys').write_text('secret\n')
  keys = read_api_keys('0.0.0.0', str(tmp_path / 'keys'))
  assert keys.users == (b'secret',)
