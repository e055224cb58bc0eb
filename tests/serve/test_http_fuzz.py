# SPDX-License-Identifier: Apache-2.0
"""Whatever is sent, no request ends in a 5xx, and every error has its form."""

import copy
import json
import random

import pytest

from moepeft.serve.http.keys import Keys
from tests.serve.small_server import (
  FakeEmbedder,
  byte_tokenizer,
  constrained,
  fake,
  running,
)

ROUNDS = 120
TOOL = {
  'type': 'function',
  'function': {'name': 'f', 'parameters': {'type': 'object'}},
}
SEEDS = (
  (
    '/v1/chat/completions',
    {
      'model': 'base',
      'messages': [
        {'role': 'system', 'content': 'a'},
        {'role': 'user', 'content': [{'type': 'text', 'text': 'b'}]},
        {
          'role': 'assistant',
          'content': None,
          'tool_calls': [
            {
              'id': 'x',
              'type': 'function',
              'function': {'name': 'f', 'arguments': '{"a": 1}'},
            }
          ],
        },
        {'role': 'tool', 'content': 'c', 'tool_call_id': 'x'},
      ],
      'max_tokens': 5,
      'temperature': 0.5,
      'top_p': 0.9,
      'n': 2,
      'stop': ['x'],
      'seed': 7,
      'logprobs': True,
      'top_logprobs': 2,
      'stream': False,
      'response_format': {
        'type': 'json_schema',
        'json_schema': {'name': 'a', 'schema': {'type': 'object'}},
      },
    },
  ),
  (
    '/v1/chat/completions',
    {
      'model': 'base',
      'messages': [{'role': 'user', 'content': 'a'}],
      'tools': [TOOL],
      'tool_choice': 'required',
      'parallel_tool_calls': False,
      'max_completion_tokens': 60,
      'routing': True,
    },
  ),
  (
    '/v1/completions',
    {
      'model': 'base',
      'prompt': ['a', 'b'],
      'max_tokens': 3,
      'echo': True,
      'logprobs': 2,
      'stream': True,
      'stream_options': {'include_usage': True},
      'stop': 'z',
      'min_p': 0.1,
      'repetition_penalty': 1.1,
      'response_format': {'type': 'regex', 'regex': 'a+'},
    },
  ),
  ('/v1/embeddings', {'model': 'vectors', 'input': ['a', 'b']}),
  ('/v1/adapters', {'name': 'a', 'path': 'runs/a'}),
  ('/v1/adapters/unload', {'name': 'a'}),
  ('/tokenize', {'model': 'base', 'prompt': 'a'}),
  ('/detokenize', {'model': 'base', 'tokens': [5, 6]}),
)
BODIES = pytest.mark.parametrize('path, valid', SEEDS)
ODD = (
  None,
  True,
  0,
  -1,
  1,
  2**31,
  2**63,
  10**40,
  0.5,
  1e308,
  '',
  'a',
  'ä\u0000🎈',
  '\ud800',
  '<|im_end|>',
  '{{ 7 }}',
  'a' * 3000,
  [],
  [[]],
  [[[]]],
  [None],
  [True],
  [1, 'a'],
  ['a', 'b', 'c'],
  {},
  {'a': 'b'},
  {'type': 'text'},
  {'type': 'json_schema'},
  {'type': 'grammar', 'grammar': 'start: "a"'},
  {'role': 'user', 'content': 'a'},
  {'$ref': '#'},
)


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  words = byte_tokenizer(tmp_path_factory.mktemp('words'))
  keys = Keys((), (b'admin',))
  service = constrained(fake(words, keys=keys), words)
  service.embedder = FakeEmbedder()
  with running(service) as found:
    found.key = 'admin'
    found.engine.load('a', 'runs/a')
    yield found


def places(value, path=()):
  """Every place of a body."""
  yield path
  items = value.items() if isinstance(value, dict) else ()
  items = enumerate(value) if isinstance(value, list) else items
  for key, item in items:
    yield from places(item, (*path, key))


def mutated(seed, body):
  """A body that is changed at one to three places."""
  rng, body = random.Random(seed), copy.deepcopy(body)
  for _ in range(rng.randint(1, 3)):
    path = rng.choice([p for p in places(body) if p])
    *parents, last = path
    node = body
    for key in parents:
      node = node[key]
    how = rng.choice(('set', 'set', 'set', 'remove', 'add', 'double'))
    if how == 'set' or isinstance(node, list) and how != 'double':
      node[last] = copy.deepcopy(rng.choice(ODD))
    elif how == 'remove':
      del node[last]
    elif how == 'add':
      node[rng.choice(('x', 'n', 'stop', 'type'))] = rng.choice(ODD)
    else:
      node[last] = [copy.deepcopy(node[last])] * 2
    if not body:
      break
  return body


def damaged(seed, raw):
  """Bytes that are changed, cut or doubled somewhere."""
  rng, raw = random.Random(seed), bytearray(raw)
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
      raw[at:at] = rng.choice((b'{', b'}', b'"', b',', b'\\', b'[', b'9' * 50))
  return bytes(raw)


def check(client, path, raw):
  status, headers, body = client.send('POST', path, raw)
  assert status < 500, (path, raw, body)
  if status >= 400:
    assert status in (400, 404, 413, 429), (path, raw, body)
    error = json.loads(body)['error']
    assert set(error) == {'message', 'type', 'param', 'code'}
  elif headers['content-type'].startswith('text/event-stream'):
    # Nothing that broke off, either.
    assert body.endswith(b'data: [DONE]\n\n'), (path, raw, body)
  else:
    json.loads(body)
  return status


@BODIES
def test_no_mutation_of_a_body_ends_in_a_5xx(client, path, valid):
  # What is mutated was right.
  assert check(client, path, json.dumps(valid).encode()) == 200
  client.engine.load('a', 'runs/a')
  found = set()
  for seed in range(ROUNDS):
    body = mutated(f'{path}/{seed}', valid)
    found.add(check(client, path, json.dumps(body).encode()))
  # The mutations are not all of one kind.
  assert 400 in found
  assert client.engine.idle()


@BODIES
def test_no_damage_to_a_body_ends_in_a_5xx(client, path, valid):
  raw = json.dumps(valid).encode()
  for seed in range(ROUNDS // 4):
    check(client, path, damaged(f'{path}/{seed}', raw))
  assert client.engine.idle()
  assert client.get('/health')[0] == 200
