# SPDX-License-Identifier: Apache-2.0
"""Every error is OpenAI's form, and never FastAPI's 422."""

import json

import pytest

from moepeft.serve.http.limits import RequestLimits
from tests.serve.small_server import byte_tokenizer, fake, running

CHAT, COMPLETIONS = '/v1/chat/completions', '/v1/completions'
TALK = {'model': 'base', 'messages': [{'role': 'user', 'content': 'a'}]}
TEXT = {'model': 'base', 'prompt': 'a'}


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  words = byte_tokenizer(tmp_path_factory.mktemp('words'))
  with running(
    fake(words, limits=RequestLimits(body=5000, choices=7))
  ) as value:
    yield value


def problem(status, answer):
  """The error of an answer, which must be of OpenAI's form."""
  value = json.loads(answer) if isinstance(answer, bytes) else answer
  assert set(value) == {'error'}, (status, value)
  error = value['error']
  assert set(error) == {'message', 'type', 'param', 'code'}
  assert error['message'] and '\n' not in error['message']
  assert 'ydantic' not in error['message']
  return error


@pytest.mark.parametrize(
  'body, param',
  [
    ({**TALK, 'temperature': 'hot'}, 'temperature'),
    ({**TALK, 'temperature': 2.5}, 'temperature'),
    ({**TALK, 'top_p': -1}, 'top_p'),
    ({**TALK, 'n': True}, 'n'),
    ({**TALK, 'n': 0}, 'n'),
    ({**TALK, 'n': 8}, 'n'),
    ({**TALK, 'max_tokens': 0}, 'max_tokens'),
    ({**TALK, 'max_tokens': 10**30}, 'max_tokens'),
    ({**TALK, 'seed': 10**30}, 'seed'),
    ({**TALK, 'stop': ['a', '']}, 'stop'),
    ({**TALK, 'top_logprobs': 3}, 'top_logprobs'),
    ({**TALK, 'logprobs': True, 'top_logprobs': 21}, 'top_logprobs'),
    ({**TALK, 'stream_options': {}}, 'stream_options'),
    ({**TALK, 'messages': []}, 'messages'),
    ({**TALK, 'messages': 'hello'}, 'messages'),
    ({**TALK, 'messages': [{'role': 'god', 'content': 'a'}]}, None),
    ({**TALK, 'messages': [{'role': 'user'}]}, 'messages[0]'),
    ({**TALK, 'messages': [{'role': 'user', 'content': 7}]}, None),
    ({**TALK, 'response_format': {'type': 'xml'}}, 'response_format.type'),
    ({**TALK, 'response_format': {'type': 'json_schema'}}, 'response_format'),
    ({**TALK, 'frequency_penalty': 2.5}, 'frequency_penalty'),
    ({**TALK, 'presence_penalty': '1'}, 'presence_penalty'),
    ({**TALK, 'logit_bias': {'5': 101}}, 'logit_bias.5'),
    ({**TALK, 'logit_bias': {'5': True}}, 'logit_bias.5'),
    ({**TALK, 'logit_bias': {'05': 1}}, 'logit_bias'),
    ({**TALK, 'logit_bias': {'-5': 1}}, 'logit_bias'),
    # The vocabulary has 259.
    ({**TALK, 'logit_bias': {'259': 1}}, 'logit_bias'),
    ({**TALK, 'functions': [{}]}, 'functions'),
    ({**TALK, 'colour': 'red'}, 'colour'),
    ({'model': 'base'}, 'messages'),
    ({'messages': TALK['messages']}, 'model'),
  ],
)
def test_a_wrong_chat_is_a_400_that_names_the_field(client, body, param):
  status, answer = client.post(CHAT, body)
  assert status == 400
  error = problem(status, answer)
  assert error['type'] == 'invalid_request_error'
  if param is not None:
    assert error['param'] == param, error


@pytest.mark.parametrize(
  'body, param',
  [
    ({**TEXT, 'prompt': 5}, 'prompt'),
    ({**TEXT, 'prompt': []}, 'prompt'),
    ({**TEXT, 'prompt': ['a', 5]}, 'prompt'),
    ({**TEXT, 'prompt': [True]}, 'prompt'),
    ({**TEXT, 'prompt': [[]]}, 'prompt'),
    ({**TEXT, 'prompt': [-1]}, 'prompt'),
    # The vocabulary has 259.
    ({**TEXT, 'prompt': [259]}, 'prompt'),
    ({**TEXT, 'prompt': [2**70]}, 'prompt'),
    ({**TEXT, 'prompt': ''}, 'prompt'),
    ({**TEXT, 'suffix': 'b'}, 'suffix'),
    ({**TEXT, 'best_of': 3}, 'best_of'),
    ({**TEXT, 'max_tokens': 0}, 'max_tokens'),
    ({**TEXT, 'logprobs': True}, 'logprobs'),
    ({**TEXT, 'logprobs': -1}, 'logprobs'),
    # 2 prompts times 4 answers are 8, one more than the limit.
    ({**TEXT, 'prompt': ['a', 'b'], 'n': 4}, 'n'),
  ],
)
def test_a_wrong_completion_is_a_400_that_names_the_field(client, body, param):
  status, answer = client.post(COMPLETIONS, body)
  assert status == 400
  assert problem(status, answer)['param'] == param


def test_what_is_not_supported_is_taken_where_it_does_nothing(client):
  status, _ = client.chat(
    service_tier='auto',
    store=False,
    modalities=['text'],
    audio=None,
    user='me',
    metadata={'a': 'b'},
  )
  assert status == 200
  assert client.complete(best_of=1, suffix=None)[0] == 200


@pytest.mark.parametrize(
  'raw',
  [
    b'',
    b'{',
    b'[1]',
    b'"text"',
    b'null',
    b'{"model": NaN}',
    b'{"model": "base", "prompt": "\xff"}',
    b'{"model": "base", "prompt": "\\ud800"}',
    b'{"model": ' + b'9' * 4400 + b'}',
    b'[' * 4900,
    '{"model": "base", "prompt": "a"}'.encode('utf-16'),
  ],
)
def test_what_is_no_json_object_is_a_400(client, raw):
  status, _, body = client.send('POST', COMPLETIONS, raw)
  assert status == 400
  problem(status, body)


@pytest.mark.parametrize(
  'kind', ['text/plain', 'multipart/form-data; boundary=x', '', 'a/b/c']
)
def test_another_content_type_is_a_400(client, kind):
  # Of text/plain a page of elsewhere could send one without being asked.
  raw = json.dumps(TEXT).encode()
  status, _, body = client.send('POST', COMPLETIONS, raw, Content_Type=kind)
  assert status == 400
  assert 'application/json' in problem(status, body)['message']


def test_a_body_beyond_the_limit_is_a_413(client):
  status, answer = client.post(COMPLETIONS, {**TEXT, 'prompt': 'a' * 5001})
  assert status == 413
  assert '5,000' in problem(status, answer)['message']


def test_a_body_that_does_not_tell_its_length_is_limited_too(client):
  connection = client.connect()
  pieces = iter([b'x' * 3000, b'x' * 3000])
  headers = {'Content-Type': 'application/json'}
  connection.request('POST', COMPLETIONS, pieces, headers)
  answer = connection.getresponse()
  assert answer.status == 413
  problem(413, answer.read())
  connection.close()


@pytest.mark.parametrize(
  'method, path, status',
  [
    ('GET', '/v1/nothing', 404),
    ('GET', '/docs', 404),
    ('POST', '/openapi.json', 405),
    ('POST', '/v1/models/', 405),
    ('GET', CHAT, 405),
    ('PUT', COMPLETIONS, 405),
    ('DELETE', '/health', 405),
    ('POST', '/v1/chat/completions/', 404),
  ],
)
def test_another_route_or_method_is_told_in_the_same_form(
  client, method, path, status
):
  value, _, body = client.send(method, path)
  assert value == status
  problem(status, body)


def test_an_unknown_model_is_a_404_and_never_the_base(client):
  for path, body in ((CHAT, TALK), (COMPLETIONS, TEXT)):
    request_count = len(client.engine.requests)
    status, answer = client.post(path, {**body, 'model': 'bas'})
    assert status == 404
    assert problem(status, answer)['code'] == 'model_not_found'
    assert len(client.engine.requests) == request_count
  assert client.get('/v1/models/bas')[0] == 404


def test_a_prompt_beyond_the_places_says_how_long_it_is(client):
  # 600 letters are 600 tokens, and the engine has 512 places.
  status, answer = client.complete('a' * 600)
  assert status == 400
  error = problem(status, answer)
  assert error['code'] == 'context_length_exceeded'
  assert '600' in error['message'] and '512' in error['message']


def test_prompt_and_answer_beyond_the_places_are_refused(client):
  status, answer = client.complete('a' * 500, max_tokens=13)
  assert status == 400
  assert problem(status, answer)['code'] == 'context_length_exceeded'
  assert client.complete('a' * 500, max_tokens=12)[0] == 200


def test_a_failure_of_the_engine_is_a_500_and_the_next_request_is_answered(
  client,
):
  original = client.engine.answer
  client.engine.answer = lambda request: [100, -1]
  status, answer = client.complete()
  client.engine.answer = original
  assert status == 500
  assert problem(status, answer)['type'] == 'server_error'
  assert client.complete()[0] == 200


def test_a_bug_is_a_500_in_the_same_form(client, monkeypatch):
  def broken(request):
    raise AssertionError('a bug')

  monkeypatch.setattr(client.engine, 'answer', broken)
  status, answer = client.complete()
  assert status == 500
  assert 'a bug' not in problem(status, answer)['message']


def test_a_full_queue_is_a_429_that_says_when_to_try_again(client):
  client.engine.running.clear()
  # 4 slots and 8 places in the queue.
  bodies = [{**TEXT, 'n': 6}, {**TEXT, 'n': 6}]
  connections = [client.connect() for _ in bodies]
  for connection, body in zip(connections, bodies, strict=True):
    client.begin(connection, 'POST', COMPLETIONS, body)
  assert client.engine.busy(12)
  status, headers, body = client.send('POST', COMPLETIONS, TEXT)
  assert status == 429
  # The engine's estimate is 2.5 s, and the header is whole seconds.
  assert headers['retry-after'] == '3'
  assert problem(429, body)['code'] == 'queue_full'
  client.engine.running.set()
  assert [c.getresponse().status for c in connections] == [200, 200]
  for connection in connections:
    connection.close()


def test_of_a_request_that_is_refused_halfway_nothing_stays(client):
  client.engine.running.clear()
  first = client.connect()
  client.begin(first, 'POST', COMPLETIONS, {**TEXT, 'n': 7})
  assert client.engine.busy(7)
  # 7 and 6 are one more than there are places for.
  status, _, _ = client.send('POST', COMPLETIONS, {**TEXT, 'n': 6})
  assert status == 429
  assert client.engine.stats().running + client.engine.stats().waiting == 7
  client.engine.running.set()
  assert first.getresponse().status == 200
  first.close()
