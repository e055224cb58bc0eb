# SPDX-License-Identifier: Apache-2.0
"""Only a caller with an admin key sees paths of the server."""

import pytest

from moepeft.core.http_access import ApiKeys
from moepeft.inference import api
from moepeft.serve.http import app
from tests.serve.small_server import fake, running

PATH = '/srv/secret-place/runs/law'
KEYS = ApiKeys((b'user',), (b'admin',))


def load(client):
  card = api.LoadedAdapter('law', 'lora(rank=4)', 'abc', 99, PATH)
  client.engine.loads['law'] = card


@pytest.fixture(params=[KEYS, ApiKeys((), (b'admin',)), ApiKeys()])
def client(request):
  """Clients of servers with keys for all, for adapters, and for nothing."""
  with running(fake(keys=request.param)) as served:
    load(served)
    served.key = 'user'
    yield served


def test_no_answer_to_a_user_names_a_path_of_the_server(client):
  bodies = (
    {},
    {'model': 'nothing'},
    {'model': 'law', 'prompt': 'a', 'messages': 7},
    {'model': 'law', 'prompt': 'a', 'max_tokens': 2},
    {'model': 'law', 'messages': [{'role': 'user', 'content': 'a'}]},
    {'name': 'law'},
    {'name': 'law', 'path': f'{PATH}/broken'},
  )
  for method, path, _ in app.ROUTES:
    path = path.replace('{name:path}', 'law').replace('{name}', 'law')
    for body in (None,) if method == 'GET' else bodies:
      _, headers, answer = client.send(method, path, body)
      assert b'secret-place' not in answer, (method, path, body)
      assert 'secret-place' not in str(headers)
  assert client.engine.loads, 'a user has unloaded an adapter'


def test_a_failure_of_the_engine_names_no_path(client, caplog):
  client.engine.failure = f'RuntimeError: {PATH}/adapter.npz is damaged'
  client.engine.answer = lambda request: [-1]
  for stream in (False, True):
    body = {'model': 'base', 'prompt': 'a', 'stream': stream}
    _, _, answer = client.send('POST', '/v1/completions', body)
    assert b'the engine failed' in answer and b'secret-place' not in answer
  # Who runs the server reads it in the log.
  assert f'{PATH}/adapter.npz' in caplog.text


def test_an_engine_that_is_broken_names_no_path(client, monkeypatch, caplog):
  def submit(request, deliver):
    client.engine.ready = False
    raise api.RequestRefused(f'nothing can be computed any more: {PATH}')

  monkeypatch.setattr(client.engine, 'submit', submit)
  status, answer = client.complete()
  assert status == 503 and 'secret-place' not in str(answer)
  assert PATH in caplog.text


def test_an_admin_sees_where_an_adapter_lies():
  with running(fake(keys=KEYS)) as client:
    load(client)
    client.key = 'admin'
    (card,) = client.get('/v1/adapters')[1]['data']
    assert card['source'] == PATH
    client.key = 'user'
    (card,) = client.get('/v1/adapters')[1]['data']
    assert 'source' not in card
    assert card['id'] == 'law' and card['sha256'] == 'abc'
