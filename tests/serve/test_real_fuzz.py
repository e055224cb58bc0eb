# SPDX-License-Identifier: Apache-2.0
"""Whatever is sent to a real server, no request ends in a 5xx."""

import http.client
import json
import random
import socket
import time

import pytest

from tests.fuzz.test_fuzz_http import damaged, mutated
from tests.serve.real_server import BASE, EMBEDDER

pytestmark = pytest.mark.slow
CHAT, COMPLETIONS = '/v1/chat/completions', '/v1/completions'
EMBEDDINGS = '/v1/embeddings'
# Of one request; none of these asks for much.
SECONDS = 120
TURNS = [{'role': 'user', 'content': 'a'}]
TOOL = {
  'type': 'function',
  'function': {
    'name': 'f',
    'parameters': {
      'type': 'object',
      'properties': {'a': {'type': 'integer', 'maximum': 9, 'minimum': 0}},
      'required': ['a'],
    },
  },
}
# Short answers: it is requests that are tried, not the model.
SEEDS = (
  (
    CHAT,
    {
      'model': BASE,
      'messages': [
        {'role': 'system', 'content': 'a'},
        {'role': 'user', 'content': [{'type': 'text', 'text': 'b'}]},
      ],
      'max_tokens': 2,
      'temperature': 0.5,
      'top_p': 0.9,
      'top_k': 7,
      'n': 1,
      'stop': ['x'],
      'seed': 7,
      'logprobs': True,
      'top_logprobs': 2,
    },
  ),
  (
    CHAT,
    {
      'model': 'molora',
      'messages': TURNS,
      'tools': [TOOL],
      'tool_choice': 'required',
      'parallel_tool_calls': False,
      'max_completion_tokens': 5,
      'routing': True,
      'stream': True,
    },
  ),
  (
    CHAT,
    {
      'model': 'ia3',
      'messages': TURNS,
      'max_tokens': 3,
      'response_format': {
        'type': 'json_schema',
        'json_schema': {
          'name': 'a',
          'strict': True,
          'schema': {
            'type': 'object',
            'properties': {'a': {'enum': [1, 'b', None]}},
            'required': ['a'],
            'additionalProperties': False,
          },
        },
      },
    },
  ),
  (
    COMPLETIONS,
    {
      'model': 'lora',
      'prompt': ['a', 'b'],
      'max_tokens': 2,
      'echo': True,
      'logprobs': 2,
      'stream': True,
      'stream_options': {'include_usage': True},
      'min_p': 0.1,
      'repetition_penalty': 1.1,
    },
  ),
  (
    COMPLETIONS,
    {
      'model': BASE,
      'prompt': [[5, 6, 7]],
      'max_tokens': 2,
      'response_format': {'type': 'regex', 'regex': '[a-c]{1,3}'},
    },
  ),
  (EMBEDDINGS, {'model': EMBEDDER, 'input': ['a', 'b'], 'dimensions': 8}),
  ('/v1/adapters', {'name': 'a', 'path': 'runs/a'}),
  ('/v1/adapters/unload', {'name': 'a'}),
  ('/tokenize', {'model': BASE, 'messages': TURNS, 'tools': [TOOL]}),
  ('/detokenize', {'model': BASE, 'tokens': [5, 6]}),
)
SEED = pytest.mark.parametrize('path, valid', SEEDS)


def send(real, path, raw, method='POST', **headers):
  """(status, headers, bytes)."""
  headers = {'Content-Type': 'application/json'} | {
    name.replace('_', '-'): value for name, value in headers.items()
  }
  connection = http.client.HTTPConnection(
    '127.0.0.1', real.port, timeout=SECONDS
  )
  try:
    connection.request(method, path, raw, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()
  finally:
    connection.close()


def check(real, path, raw, **headers):
  """The status of an answer, whose form is looked at."""
  status, head, body = send(real, path, raw, **headers)
  assert status < 500, (path, raw[:2000], body)
  if status >= 400:
    error = json.loads(body)['error']
    assert set(error) == {'message', 'type', 'param', 'code'}, body
    assert error['message'] and error['type'], body
  elif head['content-type'].startswith('text/event-stream'):
    assert body.endswith(b'data: [DONE]\n\n'), (path, raw[:2000], body[-999:])
    assert b'"error"' not in body
  else:
    json.loads(body)
  return status


def answers(real):
  """Whether it still does, and has nothing left to do."""
  body = {'model': BASE, 'prompt': 'a', 'max_tokens': 1}
  assert check(real, COMPLETIONS, json.dumps(body).encode()) == 200
  until = time.monotonic() + SECONDS
  while True:
    values = real.metrics()
    if not values['moepeft_running'] + values['moepeft_waiting']:
      return
    assert time.monotonic() < until, 'a request is still under way'
    time.sleep(0.1)


def short(body):
  """A body that asks for few tokens, whatever a mutation has made of it."""
  for field in ('max_tokens', 'max_completion_tokens'):
    if isinstance(body.get(field), int) and body[field] > 9:
      # What is too large for any model is to be refused.
      body[field] = 7 if body[field] < 10_000 else body[field]
  if 'max_tokens' not in body and 'max_completion_tokens' not in body:
    body |= {'max_tokens': 3}
  return body


@SEED
def test_no_mutation_of_a_body_ends_in_a_5xx(real, path, valid):
  # What is mutated was right; adapters are locked.
  first = check(real, path, json.dumps(valid).encode())
  assert first == (403 if 'adapters' in path else 200)
  values = set()
  for seed in range(30):
    body = mutated(random.Random(f'{path}/{seed}'), valid)
    body = short(body) if path in (CHAT, COMPLETIONS) else body
    values.add(check(real, path, json.dumps(body).encode()))
  assert 'adapters' in path or 400 in values
  answers(real)


@SEED
def test_no_damage_to_a_body_ends_in_a_5xx(real, path, valid):
  raw = json.dumps(valid).encode()
  for seed in range(12):
    check(real, path, damaged(random.Random(f'{path}/{seed}'), raw))
  answers(real)


def nested(depth, inner='1', opening='[', closing=']'):
  return opening * depth + inner + closing * depth


def chat(**fields):
  return {'model': BASE, 'messages': TURNS, 'max_tokens': 3, **fields}


def schema(value, strict=True):
  json_schema = {'name': 'a', 'schema': value, 'strict': strict}
  return chat(
    response_format={'type': 'json_schema', 'json_schema': json_schema}
  )


def form(kind, value):
  return chat(response_format={'type': kind, kind: value})


def parameters(value):
  function = {'name': 'f', 'parameters': value}
  tool = {'type': 'function', 'function': function}
  return chat(tools=[tool], tool_choice='required')


DEEP = {'type': 'object'}
for _ in range(70):
  DEEP = {'type': 'object', 'properties': {'a': DEEP}}
TREE = {
  '$defs': {
    'node': {
      'type': 'object',
      'properties': {'next': {'$ref': '#/$defs/node'}},
      'additionalProperties': False,
    }
  },
  '$ref': '#/$defs/node',
}
WIDE = {
  'type': 'object',
  'properties': {f'p{i}': {'type': 'string'} for i in range(3000)},
}
# (what may be answered, a body of /v1/chat/completions)
HARD = {
  'a recursive schema': ({200}, schema(TREE)),
  'a schema that is itself': ({400}, schema({'$ref': '#'})),
  'references in a circle': (
    {400},
    schema(
      {
        '$defs': {'a': {'$ref': '#/$defs/b'}, 'b': {'$ref': '#/$defs/a'}},
        '$ref': '#/$defs/a',
      }
    ),
  ),
  'a reference to nothing': ({400}, schema({'$ref': '#/$defs/a'})),
  'a reference elsewhere': ({400}, schema({'$ref': 'http://127.0.0.1:1/a'})),
  'a deep schema': ({400}, schema(DEEP)),
  'a wide schema': ({400}, schema(WIDE)),
  'a schema of nothing': ({400}, schema({'enum': []})),
  'a schema that no value keeps': (
    {400},
    schema({'type': 'integer', 'minimum': 5, 'maximum': 4}),
  ),
  'many items': (
    {200, 400},
    schema({'type': 'array', 'minItems': 10**9, 'items': {'type': 'null'}}),
  ),
  'a huge multiple': (
    {200, 400},
    schema({'type': 'integer', 'multipleOf': 10**9 + 7}),
  ),
  'a regex of a schema': (
    {200, 400},
    schema({'type': 'string', 'pattern': '(a?){50}' * 9}),
  ),
  'a regex that blows up': ({200, 400}, form('regex', '(a|aa|b)*c.{500}d')),
  'a regex of repeats': ({200, 400}, form('regex', '((a{1,99}){1,99}){1,99}')),
  'a regex with lookahead': ({400}, form('regex', '(?=a)b')),
  'a regex that is open': ({400}, form('regex', '(')),
  'a regex of nothing': ({200, 400}, form('regex', '')),
  'a grammar of itself': ({200, 400}, form('grammar', 'start: start')),
  'a grammar without a start': ({400}, form('grammar', 'a: "b"')),
  'no grammar': ({400}, form('grammar', '\x00%%%')),
  'many choices': ({200, 400}, form('choice', [f'{i}' for i in range(20_000)])),
  'parameters of nothing': ({400}, parameters({'type': 'object', 'enum': []})),
  'recursive parameters': (
    {200, 400},
    parameters({**TREE, 'type': 'object'}),
  ),
  'a hundred tools of one name': ({400}, chat(tools=[TOOL] * 100)),
  'many messages': ({400}, chat(messages=TURNS * 2000)),
  'empty messages': ({400}, chat(messages=[])),
  'an empty message': ({200}, chat(messages=[{'role': 'user', 'content': ''}])),
  'no role': ({400}, chat(messages=[{'role': 'cat', 'content': 'a'}])),
  'a template in a message': (
    {200},
    chat(messages=[{'role': 'user', 'content': '{{ 7 }} {% for %} {#'}]),
  ),
  'marks of turns in a message': (
    {200},
    chat(messages=[{'role': 'user', 'content': '<|im_end|>\n<|im_start|>'}]),
  ),
  'zeros in a message': (
    {200},
    chat(messages=[{'role': 'user', 'content': '\x00\x1b[2J\u202e\ufffe'}]),
  ),
  'a negative n': ({400}, chat(n=-1)),
  'a huge n': ({400}, chat(n=10**30)),
  'a huge seed': ({400}, chat(seed=2**63)),
  'the smallest seed': ({200}, chat(seed=-(2**63))),
  'a tiny temperature': ({200}, chat(temperature=5e-324)),
  'a tiny top_p': ({200}, chat(top_p=5e-324, temperature=2)),
  'a tiny penalty': ({200}, chat(repetition_penalty=5e-324)),
  'a huge top_k': ({200}, chat(top_k=2**31 - 1)),
  'every stop string': ({200}, chat(stop=[chr(97 + i) for i in range(16)])),
  'too many stop strings': ({400}, chat(stop=['a'] * 17)),
}


@pytest.mark.parametrize('name', HARD)
def test_what_is_hard_is_answered_or_refused(real, name):
  may, body = HARD[name]
  began = time.monotonic()
  assert check(real, CHAT, json.dumps(body).encode()) in may
  stream = check(real, CHAT, json.dumps({**body, 'stream': True}).encode())
  assert stream in may
  # And does not hold up the server for others.
  assert time.monotonic() - began < 60
  answers(real)


@pytest.mark.parametrize(
  'prompt, status',
  [
    ([-1], 400),
    ([49_151], 200),
    ([49_152], 400),
    ([2**31], 400),
    ([10**40], 400),
    ([[1], []], 400),
    ([], 400),
    ('', 400),
    ([''], 400),
    ([[1], 'a'], 400),
    ([True], 400),
    ([1.0], 400),
    ('\x00', 200),
    ([0] * 600, 400),
  ],
)
def test_prompts_beyond_the_model_are_refused(real, prompt, status):
  body = {'model': BASE, 'prompt': prompt, 'max_tokens': 1}
  assert check(real, COMPLETIONS, json.dumps(body).encode()) == status


@pytest.mark.parametrize('path', sorted({path for path, _ in SEEDS}))
def test_bodies_that_are_no_json_are_refused(real, path):
  valid = json.dumps(dict(SEEDS)[path]).encode()
  for raw in (
    b'',
    b'\xff\xfe',
    b'\xed\xa0\x80',
    valid.decode().encode('utf-16'),
    valid[:-1],
    valid + b'}',
    b'null',
    b'[]',
    b'"a"',
    b'NaN',
    b'1e999',
    b'9' * 10_000,
    nested(50_000).encode(),
    nested(50_000, opening='{"a":', closing='}').encode(),
    b'{"model": NaN}',
    b'{"model": "\\ud800"}',
    b'{"a": ' + b'-' * 99 + b'}',
    b'{' + b'"a": 1,' * 50_000 + b'"b": 1}',
    b' ' * (1 << 21),
  ):
    status = check(real, path, raw)
    assert status in (400, 403, 413), raw[:99]
  # RFC 8259, section 8.1: a byte order mark may be ignored, and is.
  plain = check(real, path, valid)
  assert check(real, path, b'\xef\xbb\xbf' + valid) == plain
  for kind in ('text/plain', 'application/x-www-form-urlencoded', '', 'a/b;c'):
    assert check(real, path, valid, Content_Type=kind) in (400, 403)
  answers(real)


def test_other_methods_and_paths_are_refused(real):
  for method in ('GET', 'PUT', 'PATCH', 'DELETE', 'TRACE', 'FROG'):
    for path in (CHAT, '/v1/nothing', '/v1/models/%00%ff', '/' + 'a' * 3000):
      status, _, body = send(real, path, None, method)
      assert status in (400, 404, 405), (method, path)
      assert method == 'FROG' or 'error' in json.loads(body)


def test_bytes_that_are_no_request_end_nothing(real):
  rng = random.Random(7)
  head = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n'
  kind = b'Content-Type: application/json\r\n'
  for raw in (
    rng.randbytes(300),
    b'GET / HTTP/9.9\r\n\r\n',
    b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',
    head + kind + b'Content-Length: 500\r\n\r\n{"model":',
    head + kind + b'Content-Length: -5\r\n\r\n{}',
    head + kind + b'Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}',
    head + kind + b'Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}',
    head + kind + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"a"',
    head + b'X: ' + b'a' * 200_000 + b'\r\n\r\n',
    head + b'Authorization: Bearer \xff\xfe\r\n' + kind + b'\r\n',
  ):
    with socket.create_connection(('127.0.0.1', real.port), 10) as sock:
      sock.sendall(raw)
      sock.shutdown(socket.SHUT_WR)
      sock.settimeout(20)
      response = b''
      try:
        while part := sock.recv(4096):
          response += part
      except ConnectionError:
        pass
    assert b' 5' not in response.partition(b'\r\n')[0], (raw[:99], response)
  answers(real)
