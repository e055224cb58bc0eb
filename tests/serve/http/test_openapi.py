# SPDX-License-Identifier: Apache-2.0
"""/openapi.json describes the routes that there are, behind the keys."""

import jsonschema
import pytest

from moepeft.core.http_access import ApiKeys
from moepeft.serve.http import app, openapi
from tests.serve.small_server import fake, running

PATH = '/openapi.json'


@pytest.fixture(scope='module')
def client():
  with running(fake(keys=ApiKeys((b'user',), ()))) as value:
    value.key = 'user'
    yield value


@pytest.fixture(scope='module')
def document(client):
  status, value = client.get(PATH)
  assert status == 200
  return value


def test_a_key_is_needed(client):
  status, answer = client.get(PATH, Authorization='Bearer wrong')
  assert status == 401 and answer['error']['code'] == 'invalid_api_key'


def test_it_lists_the_routes_that_there_are(document):
  listed = {
    (method.upper(), path)
    for path, operations in document['paths'].items()
    for method in operations
  }
  assert listed == {
    (method, path.replace(':path', '')) for method, path, _ in app.ROUTES
  }
  with_body = {path for method, path, _ in app.ROUTES if method == 'POST'}
  assert with_body == openapi.BODIES.keys()
  for operations in document['paths'].values():
    assert all(operation['description'] for operation in operations.values())


def test_keys_are_described_where_there_are_keys(document):
  assert document['security'] == [{'key': []}]
  assert document['paths']['/health']['get']['security'] == []
  assert 'security' not in document['paths']['/v1/models']['get']
  with running(fake()) as client:
    assert 'security' not in client.get(PATH)[1]


def test_it_is_valid_openapi(document):
  validator = pytest.importorskip('openapi_spec_validator')
  validator.validate(document)


@pytest.mark.parametrize(
  'path, body, is_valid',
  [
    ('/v1/completions', {'model': 'base', 'prompt': 'a'}, True),
    ('/v1/completions', {'prompt': 'a'}, False),
    ('/v1/responses', {'model': 'base', 'input': 'a'}, True),
    ('/v1/responses', {'model': 'base', 'input': 5}, False),
    ('/v1/chat/completions', {'model': 'base', 'messages': []}, False),
    ('/tokenize', {'model': 'base', 'prompt': 'a'}, True),
    ('/tokenize', {'model': 'base', 'prompt': 'a', 'x': 1}, False),
  ],
)
def test_the_schema_of_a_body_agrees_with_the_server(
  client, document, path, body, is_valid
):
  content = document['paths'][path]['post']['requestBody']['content']
  schema = content['application/json']['schema']
  schema = schema | {'components': document['components']}
  assert jsonschema.Draft202012Validator(schema).is_valid(body) == is_valid
  status, _ = client.post(path, body)
  # The base of this server has no chat template, but takes the body.
  assert (status == 200) == (is_valid and path != '/v1/responses')
