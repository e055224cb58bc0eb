# SPDX-License-Identifier: Apache-2.0
"""Access control: keys, hosts, origins, and the admin's routes."""

import hmac

import pytest

from moepeft.core import http_access
from moepeft.core.http_access import ApiKeys
from moepeft.serve.http import app
from tests.serve.small_server import fake, running

KEYS = ApiKeys((b'user-key', b'other-key'), (b'admin-key',))


@pytest.fixture(scope='module')
def client():
  with running(fake(keys=KEYS)) as client_:
    yield client_


def bearer(key):
  return {'Authorization': f'Bearer {key}'}


def test_every_route_but_health_and_the_page_asks_for_a_key(client):
  free = set()
  for method, path, _ in app.ROUTES:
    path = path.replace('{name:path}', 'x').replace('{name}', 'x')
    status, headers, _ = client.send(method, path)
    if status != 401:
      free.add(path)
    else:
      assert headers['www-authenticate'] == 'Bearer'
  assert free == {'/', '/health'}
  # What there is and what not is no stranger's to learn.
  assert client.get('/v1/secret')[0] == 401


@pytest.mark.parametrize(
  'header',
  [
    '',
    'user-key',
    'Bearer',
    'Bearer ',
    'Bearer user-ke',
    'Bearer user-keyy',
    'Bearer USER-KEY',
    'Basic user-key',
    'Bearer user-key,other-key',
    'Bearer \xe9',
  ],
)
def test_a_wrong_key_is_a_401(client, header):
  status, answer = client.get('/v1/models', Authorization=header)
  assert status == 401
  assert answer['error']['code'] == 'invalid_api_key'


@pytest.mark.parametrize('key', ['user-key', 'other-key', 'admin-key'])
def test_each_key_opens(client, key):
  assert client.get('/v1/models', **bearer(key))[0] == 200


def test_the_engine_is_told_who_asks_and_not_by_which_key(client):
  body = {'model': 'base', 'prompt': 'a'}
  for key in ('user-key', 'other-key', 'user-key'):
    assert client.post('/v1/completions', body, **bearer(key))[0] == 200
  first, second, third = [r.client for r in client.engine.requests[-3:]]
  assert first == third != second and first
  assert 'key' not in first


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch):
  compared = []

  def compare(a, b):
    compared.append(b)
    return a == b

  monkeypatch.setattr(hmac, 'compare_digest', compare)
  assert KEYS.is_authorized(b'Bearer user-key')
  # The first is right, and the others are compared all the same.
  assert compared == [b'user-key', b'other-key', b'admin-key']


def test_a_user_may_see_adapters_and_an_admin_may_change_them(client):
  body = {'name': 'law', 'path': 'runs/law'}
  send = client.post
  assert client.get('/v1/adapters', **bearer('user-key'))[1]['data'] == []
  status, answer = send('/v1/adapters', body, **bearer('user-key'))
  assert status == 403 and answer['error']['code'] == 'not_admin'
  assert client.engine.adapters() == []
  status, answer = send('/v1/adapters', body, **bearer('admin-key'))
  assert status == 200
  assert answer['id'] == 'law' and answer['sha256'] == 'sha of runs/law'
  unload = {'name': 'law'}
  path = '/v1/adapters/unload'
  assert send(path, unload, **bearer('user-key'))[0] == 403
  assert send(path, unload, **bearer('admin-key'))[0] == 200
  assert send(path, unload, **bearer('admin-key'))[0] == 404


def test_without_an_admin_key_adapters_are_locked_and_say_so():
  with running(fake()) as client:
    body = {'name': 'law', 'path': 'runs/law'}
    status, answer = client.post('/v1/adapters', body)
    assert status == 403
    assert '--admin_key_file' in answer['error']['message']
    assert client.send('DELETE', '/v1/adapters/law')[0] == 403


def test_a_page_of_elsewhere_gets_no_answer_and_named_ones_do():
  origin = {'Origin': 'https://chat.example'}
  asks = {'Access_Control_Request_Method': 'POST'}
  asks['Access_Control_Request_Headers'] = 'authorization'
  path = '/v1/chat/completions'
  with running(fake(keys=KEYS)) as client:
    status, headers, _ = client.send('OPTIONS', path, **origin, **asks)
    assert status == 401
    assert 'access-control-allow-origin' not in headers
  with running(fake(keys=KEYS, origins=('https://chat.example',))) as client:
    status, headers, _ = client.send('OPTIONS', path, **origin, **asks)
    assert status == 200
    assert headers['access-control-allow-origin'] == 'https://chat.example'
    assert headers['access-control-allow-headers'] == 'authorization'
    # Asking is free, being answered is not.
    status, headers, _ = client.send('GET', '/v1/models', **origin)
    assert status == 401
    assert headers['access-control-allow-origin'] == 'https://chat.example'
    foreign = {'Origin': 'https://evil.example'}
    status, headers, _ = client.send('OPTIONS', path, **foreign, **asks)
    assert status == 400
    assert 'access-control-allow-origin' not in headers


def test_a_name_that_was_made_to_lead_here_is_not_answered():
  with running(fake(hosts=('localhost', '127.0.0.1'))) as client:
    assert client.get('/v1/models')[0] == 200
    assert client.get('/v1/models', Host='LOCALHOST:99')[0] == 200
    status, answer = client.get('/v1/models', Host='evil.example:8000')
    assert status == 403 and answer['error']['code'] == 'wrong_host'


def test_keys_are_read_a_line_each(tmp_path):
  path = tmp_path / 'keys'
  path.write_text('# of the team\n\n one \ntwo\n')
  assert http_access.read_keys(str(path), 'api_key_file') == (b'one', b'two')
  assert http_access.read_keys('', 'api_key_file') == ()


@pytest.mark.parametrize(
  'text, message',
  [('', 'has no key'), ('a b', 'key 1'), ('ok\nschlüssel', 'key 2')],
)
def test_a_file_without_good_keys_is_refused(tmp_path, text, message):
  path = tmp_path / 'keys'
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    http_access.read_keys(str(path), 'api_key_file')
  with pytest.raises(ValueError, match='cannot be read'):
    http_access.read_keys(str(tmp_path / 'none'), 'api_key_file')
