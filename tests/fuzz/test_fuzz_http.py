# SPDX-License-Identifier: Apache-2.0
"""Thousands of wrong bodies for every route: no 5xx, and no hang.

The fast suite sends a few to each route, the slow suite the rest.
"""

import collections
import copy
import json
import random

import pytest

from moepeft.core.http_access import ApiKeys
from moepeft.serve.http import app
from tests.serve.fake_engine import FakeEngine
from tests.serve.in_process import Hung, in_process
from tests.serve.small_server import FakeEmbedder, byte_tokenizer, constrained
from tests.serve.small_server import service as http_service

SEED = 15
ROUNDS = pytest.mark.parametrize(
  'rounds', [30, pytest.param(400, marks=pytest.mark.slow)]
)
# Seconds that one request may take; nearly all take milliseconds.
LIMIT = 60
SCHEMA = {
  'type': 'object',
  'title': 'a',
  'properties': {
    'a': {'type': 'string', 'minLength': 1, 'format': 'date'},
    'b': {'type': 'integer', 'minimum': 0, 'maximum': 9, 'multipleOf': 3},
    'c': {'type': 'array', 'items': {'$ref': '#/$defs/d'}, 'minItems': 1},
    'e': {'enum': [1, 'a', None]},
    'f': {'anyOf': [{'type': 'null'}, {'const': 7}]},
    'g': {'allOf': [{'type': 'string'}], 'format': 'time', 'pattern': '.*'},
    'h': {'prefixItems': [{'type': 'boolean'}], 'uniqueItems': False},
  },
  'patternProperties': {'^x': {'type': 'number', 'exclusiveMinimum': 0.5}},
  'additionalProperties': False,
  'required': ['a'],
  'minProperties': 1,
  '$defs': {'d': {'oneOf': [{'type': 'string'}, {'type': 'integer'}]}},
}
TOOL = {
  'type': 'function',
  'function': {
    'name': 'f',
    'description': 'a',
    'strict': True,
    'parameters': SCHEMA,
  },
}
CALL = {
  'id': 'x',
  'type': 'function',
  'function': {'name': 'f', 'arguments': '{"a": [1, {"b": "c"}]}'},
}
TALK = [
  {'role': 'system', 'content': 'a', 'name': 'b'},
  {'role': 'user', 'content': [{'type': 'text', 'text': 'b'}]},
  {
    'role': 'assistant',
    'content': None,
    'tool_calls': [CALL],
    'refusal': None,
    'annotations': [],
    'audio': None,
    'function_call': None,
  },
  {'role': 'tool', 'content': 'c', 'tool_call_id': 'x'},
]
SAMPLING = {
  'temperature': 0.5,
  'top_p': 0.9,
  'top_k': 3,
  'min_p': 0.1,
  'repetition_penalty': 1.1,
  'n': 2,
  'stop': ['x', 'yy'],
  'seed': 7,
  'user': 'a',
  'metadata': {'a': 'b'},
  'logit_bias': {'5': 1, '7': -100},
  'frequency_penalty': 0.5,
  'presence_penalty': -1,
  'stream': False,
  'routing': True,
}
FORM = {'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': SCHEMA}}
BODIES = (
  (
    '/v1/chat/completions',
    SAMPLING
    | {
      'model': 'base',
      'messages': TALK,
      'max_tokens': 5,
      'logprobs': True,
      'top_logprobs': 2,
      'response_format': FORM,
    },
  ),
  (
    '/v1/chat/completions',
    {
      'model': 'base',
      'messages': TALK,
      'tools': [TOOL],
      'tool_choice': {'type': 'function', 'function': {'name': 'f'}},
      'parallel_tool_calls': False,
      'max_completion_tokens': 40,
      'stream': True,
      'stream_options': {'include_usage': True},
    },
  ),
  (
    '/v1/responses',
    {
      'model': 'base',
      'instructions': 'a',
      'input': [
        {'role': 'user', 'content': [{'type': 'input_text', 'text': 'b'}]},
        {
          'type': 'function_call',
          'id': 'fc_1',
          'call_id': 'x',
          'name': 'f',
          'arguments': '{"a": 1}',
        },
        {'type': 'function_call_output', 'call_id': 'x', 'output': 'c'},
      ],
      'tools': [{'type': 'function', 'name': 'f', 'parameters': SCHEMA}],
      'tool_choice': 'auto',
      'text': {'format': {'type': 'text'}, 'verbosity': 'medium'},
      'include': ['message.output_text.logprobs'],
      'top_logprobs': 2,
      'max_output_tokens': 5,
      'stream': True,
      'store': False,
    },
  ),
  (
    '/v1/responses',
    {
      'model': 'base',
      'input': 'a',
      'text': {
        'format': {'type': 'json_schema', 'name': 'a', 'schema': SCHEMA}
      },
      'max_output_tokens': 40,
    },
  ),
  (
    '/v1/completions',
    SAMPLING
    | {
      'model': 'base',
      'prompt': ['a', 'b'],
      'max_tokens': 3,
      'echo': True,
      'logprobs': 2,
      'response_format': {'type': 'choice', 'choice': ['a', 'b']},
    },
  ),
  (
    '/v1/completions',
    {
      'model': 'base',
      'prompt': [5, 6, 7],
      'response_format': {'type': 'grammar', 'grammar': 'start: "a" | /b+/'},
      'stream': True,
    },
  ),
  (
    '/v1/completions',
    {
      'model': 'a',
      'prompt': 'a',
      'response_format': {'type': 'regex', 'regex': '(a|b)+c{2,3}'},
    },
  ),
  (
    '/v1/embeddings',
    {
      'model': 'vectors',
      'input': ['a', 'b'],
      'dimensions': 2,
      'encoding_format': 'base64',
      'user': 'a',
    },
  ),
  ('/v1/adapters', {'name': 'a', 'path': 'runs/a'}),
  ('/v1/adapters/unload', {'name': 'a'}),
  ('/tokenize', {'model': 'base', 'prompt': 'a'}),
  ('/tokenize', {'model': 'base', 'messages': TALK, 'tools': [TOOL]}),
  ('/detokenize', {'model': 'base', 'tokens': [5, 6]}),
)


def nested(depth, open_='[', close=']'):
  return json.loads(open_ * depth + close * depth)


ODD = (
  *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**32, 2**63, -(2**63) - 1),
  *(10**40, 0.5, -0.5, 1e308, 5e-324, float('nan'), float('inf'), 1e-7),
  *('', ' ', 'a', '0', 'ä\0🎈', '\ud800', 'a\udfff', '\x1b[31m', '\r\n'),
  *('<|im_end|>', '{{ 7 }}', '{% raw %}', '../../etc/passwd', 'a' * 3000),
  *('{"a": "\\ud800"}', '[' * 500, '{"a":' * 200, '{"a": 1e999}', 'NaN'),
  *('object', 'string', '#', '#/$defs/d', '(', '(a{1000}){1000}', 'a{,', '^$'),
  *('date', 'start: start', 'start: /(/', 'auto', 'required', 'user'),
  *([], [[]], [[[]]], [None], [True], [1, 'a'], ['a', 'b'], ['a', 'a'], ['']),
  *({}, {'a': 'b'}, {'': None}, {'a': {'a': {'a': 1}}}, {'type': 7}),
  *({'type': []}, {'type': {}}, {'type': ['string', 7]}, {'properties': []}),
  *({'enum': {}}, {'required': 'a'}, {'items': 7}, {'$ref': 7}, {'$ref': '#'}),
  *({'allOf': 7}, {'anyOf': {}}, {'oneOf': None}, {'not': {}}, {'if': []}),
  *({'const': float('nan')}, {'pattern': 7}, {'pattern': '('}, {'format': []}),
  *({'minLength': -1}, {'maxLength': 10**9}, {'minItems': 'a'}, {'$defs': 7}),
  *({'multipleOf': 0}, {'multipleOf': 1e-300}, {'minimum': 'a'}, [{}, 7]),
  *({'type': 'text'}, {'type': 'image_url'}, {'role': 'user'}),
  *({'role': 'user', 'content': 'a'}, {'name': 'f'}, {'function': 'f'}),
  *(nested(40), nested(99), nested(150)),
  *(nested(60, '{"a":[', ']}'), list(range(3000)), dict.fromkeys('abcde', 1)),
)
NAMES = (
  *('x', 'n', 'stop', 'type', 'logit_bias', 'seed', 'allOf', 'format', 'items'),
  *('pattern', 'provider_specific_fields', 'reasoning', 'tools', 'functions'),
  *('prefixItems', 'required', '$ref', 'x-guidance', 'multipleOf', 'not', ''),
)


def places(value, path=()):
  """Every place of a body."""
  yield path
  items = value.items() if isinstance(value, dict) else ()
  items = enumerate(value) if isinstance(value, list) else items
  for key, item in items:
    yield from places(item, (*path, key))


def mutated(rng, body):
  """A body that is changed at one to three places."""
  body = copy.deepcopy(body)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    # A node that was set before may be as deep as a body may never be.
    path = rng.choice([p for p in places(body) if 0 < len(p) < 30] or [()])
    if not path:
      break
    *parents, last = path
    node = body
    for key in parents:
      node = node[key]
    how = rng.choice(('set', 'set', 'set', 'remove', 'add', 'add', 'double'))
    value = copy.deepcopy(rng.choice(ODD))
    inner = node[last]
    if how == 'add' and isinstance(inner, dict):
      inner[rng.choice(NAMES)] = value
    elif how == 'remove':
      del node[last]
    elif how == 'double':
      node[last] = [copy.deepcopy(inner)] * rng.choice((2, 2, 70))
    else:
      node[last] = value
  return body


def damaged(rng, raw):
  """Bytes that are changed, cut or doubled somewhere."""
  raw = bytearray(raw)
  for _ in range(rng.randint(1, 4)):
    at = rng.randrange(len(raw) or 1)
    how = rng.randrange(4)
    if how == 0:
      raw[at : at + 1] = bytes([rng.randrange(256)])
    elif how == 1:
      del raw[at:]
    elif how == 2:
      raw[at:at] = raw[at : at + 20]
    else:
      pieces = (b'{', b'}', b'"', b',', b'\\', b'[', b'9' * 50, b'\xef\xbb\xbf')
      raw[at:at] = rng.choice(pieces)
  return bytes(raw)


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  words = byte_tokenizer(tmp_path_factory.mktemp('words'))
  # The tool's schema is a long prompt.
  engine = FakeEngine(places=8192)
  keys = ApiKeys((), (b'admin',))
  made = http_service(engine, words, keys=keys)
  service = constrained(made, words)
  service.embedder = FakeEmbedder()
  with in_process(service, 'admin') as made:
    made.engine.load('a', 'runs/a')
    yield made


def check(client, path, raw):
  """The status, which is none of a server's fault."""
  status, kind, body = client.send('POST', path, raw, LIMIT)
  where = (path, raw[:3000], body[:500])
  assert status < 500, where
  if status >= 400:
    assert status in (400, 403, 404, 413, 429), where
    error = json.loads(body)['error']
    assert set(error) == {'message', 'type', 'param', 'code'}, where
    assert error['message'] and '\n' not in error['message'], where
  elif kind.startswith('text/event-stream'):
    assert b':"server_error"' not in body, where
    ended = body.endswith(b'data: [DONE]\n\n') or b'"error":{' in body
    assert ended or b'event: response.' in body.rpartition(b'\n\n')[0], where
  else:
    json.loads(body)
  return status


@ROUNDS
@pytest.mark.parametrize('number', range(len(BODIES)))
def test_no_body_ends_in_a_5xx_or_hangs(client, number, rounds):
  path, valid = BODIES[number]
  rng = random.Random(f'{SEED}/{number}')
  client.engine.load('a', 'runs/a')
  assert check(client, path, json.dumps(valid).encode()) == 200, valid
  counts, faults = collections.Counter(), []
  for i in range(rounds):
    client.engine.load('a', 'runs/a')
    # The fake engine keeps each request, and with it its grammar's process.
    client.engine.requests.clear()
    raw = json.dumps(mutated(rng, valid)).encode()
    if i % 5 == 4:
      raw = damaged(rng, raw)
    try:
      counts[check(client, path, raw)] += 1
    except (AssertionError, Hung) as fault:
      faults.append(fault)
  print(
    f'{path}: {rounds} bodies, {dict(sorted(counts.items()))}, '
    f'{len(faults)} faults, slowest {client.slowest:.2f} s'
  )
  assert not faults, f'{len(faults)} faults; the first: {faults[0]}'
  assert counts[400]
  # One request at a time: nothing of those before may hold it up.
  assert not counts[429]
  assert client.engine.idle()


@ROUNDS
def test_no_path_or_method_ends_in_a_5xx_or_hangs(client, rounds):
  rng = random.Random(SEED)
  routes = sorted({path for _, path, _ in app.ROUTES})
  names = (
    '',
    'a',
    'base',
    '..',
    '%',
    'a/b',
    '\0',
    '\x1b[2J',
    'ä🎈',
    'a' * 5000,
  )
  counts = collections.Counter()
  for _ in range(rounds):
    path = rng.choice(routes)
    for mark in ('{name:path}', '{name}'):
      path = path.replace(mark, rng.choice(names))
    path += rng.choice(('', '', '', '/', '//', '?', '/..', 'x'))
    method = rng.choice(('GET', 'GET', 'DELETE', 'PUT', 'HEAD', 'OPTIONS', 'X'))
    status, _, _ = client.send(method, path, rng.choice((b'', b'{}')), LIMIT)
    assert status < 500, (method, path)
    counts[status] += 1
    client.engine.load('a', 'runs/a')
  print(f'paths: {rounds}, {dict(sorted(counts.items()))}')
  assert counts[200] and counts[404] and counts[405]
