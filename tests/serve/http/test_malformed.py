# SPDX-License-Identifier: Apache-2.0
"""Values of odd types anywhere are a 4xx that names the field."""

import copy
import json
import os
import socket

import pytest

from moepeft.core.http_access import ApiKeys
from moepeft.inference import api
from moepeft.inference.adapters.load import read_adapter
from moepeft.inference.tools import parser as tool_parser
from moepeft.inference.tools.tools import CALL_FORMATS
from moepeft.models.decoder.model import DecoderConfig
from tests.serve.fake_engine import END, ids_of
from tests.serve.in_process import in_process
from tests.serve.small_server import (
  FakeEmbedder,
  byte_tokenizer,
  constrained,
  fake,
)

from ...inference import banked

CHAT, COMPLETIONS = '/v1/chat/completions', '/v1/completions'
USER = {'role': 'user', 'content': 'a'}
TALK = {'model': 'base', 'messages': [USER]}
TEXT = {'model': 'base', 'prompt': 'a'}
VECTORS = {'model': 'vectors', 'input': 'a'}


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  words = byte_tokenizer(tmp_path_factory.mktemp('words'))
  service = constrained(fake(words, keys=ApiKeys((), (b'admin',))), words)
  service.embedder = FakeEmbedder()
  with in_process(service, 'admin') as client_:
    yield client_


def post(client, path, body):
  raw = body if isinstance(body, bytes) else json.dumps(body).encode()
  status, _, answer = client.send('POST', path, raw)
  return status, json.loads(answer)


def refused(client, path, body, status=400):
  """The error of an answer that is a client's fault."""
  got, answer = post(client, path, body)
  assert got == status, answer
  return answer['error']


def talk_with(arguments):
  function = {'name': 'f', 'arguments': arguments}
  call = {'id': 'x', 'type': 'function', 'function': function}
  turn = {'role': 'assistant', 'content': None, 'tool_calls': [call]}
  result = {'role': 'tool', 'content': 'b', 'tool_call_id': 'x'}
  return {'model': 'base', 'messages': [USER, turn, result]}


@pytest.mark.parametrize('path', [CHAT, '/tokenize'])
@pytest.mark.parametrize(
  'arguments, reason',
  [
    ('{"a": "\\ud800"}', 'surrogate'),
    ('{"\\udfff": 1}', 'surrogate'),
    ('{"a": NaN}', 'NaN'),
    ('{"a":' * 70 + '1' + '}' * 70, 'nested'),
    ('[' * 100_000, 'nested'),
    ('{"a": ' + '9' * 5000 + '}', 'digits'),
    ('[1]', 'object'),
    ('7', 'object'),
    ('{', 'not JSON'),
  ],
)
def test_arguments_of_calls_are_held_to_json(client, path, arguments, reason):
  error = refused(client, path, talk_with(arguments))
  assert error['param'] == 'messages[1].tool_calls'
  assert reason in error['message']


@pytest.mark.parametrize(
  'schema',
  [
    {'type': 7},
    {'type': []},
    {'type': {}},
    {'properties': []},
    {'properties': {'a': 7}},
    {'enum': {}},
    {'required': 'a'},
    {'allOf': 7},
    {'allOf': 7, 'type': 'string', 'format': 'date', 'pattern': 'a'},
    {'allOf': None, 'format': 'time', 'pattern': 'a'},
    {'anyOf': {}},
    {'items': 'a'},
    {'$ref': 7},
    {'$defs': 7, '$ref': '#/$defs/a'},
    {'type': 'string', 'pattern': 7},
    {'type': 'string', 'pattern': '('},
    {'type': 'integer', 'multipleOf': 'a'},
    {'type': 'object', 'minProperties': 'a'},
    {'type': 'integer', 'minimum': {}},
  ],
)
def test_schemas_of_odd_types_are_refused(client, schema):
  form = {'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': schema}}
  error = refused(client, CHAT, {**TALK, 'response_format': form})
  assert error['param'] == 'response_format'
  parameters = {'type': 'object', 'properties': {'a': schema}}
  function = {'name': 'f', 'parameters': parameters, 'strict': True}
  tools = [{'type': 'function', 'function': function}]
  body = {**TALK, 'tools': tools, 'tool_choice': 'required'}
  # A property that nothing fits may still be left out.
  status, answer = post(client, CHAT, body)
  assert status == 200 or answer['error']['param'] == 'tools'


@pytest.mark.parametrize(
  'path, body, param',
  [
    (COMPLETIONS, {**TEXT, 'stop': 7}, 'stop'),
    (COMPLETIONS, {**TEXT, 'stop': [7]}, 'stop[0]'),
    (COMPLETIONS, {**TEXT, 'stop': {'a': 'b'}}, 'stop'),
    (COMPLETIONS, {**TEXT, 'stop': [['a']]}, 'stop[0]'),
    (COMPLETIONS, {**TEXT, 'logit_bias': {'a': 1}}, 'logit_bias'),
    (COMPLETIONS, {**TEXT, 'logit_bias': []}, 'logit_bias'),
    (COMPLETIONS, {**TEXT, 'n': 10**18}, 'n'),
    (COMPLETIONS, {**TEXT, 'n': 10**40}, 'n'),
    (COMPLETIONS, {**TEXT, 'seed': 2**63}, 'seed'),
    (COMPLETIONS, {**TEXT, 'seed': -(2**63) - 1}, 'seed'),
    (COMPLETIONS, {**TEXT, 'top_k': 2**31}, 'top_k'),
    (COMPLETIONS, {**TEXT, 'metadata': {'a': 7}}, 'metadata.a'),
    (CHAT, {**TALK, 'tools': {}}, 'tools'),
    (CHAT, {**TALK, 'tools': [7]}, 'tools'),
    (CHAT, {**TALK, 'messages': [7]}, 'messages[0]'),
    (CHAT, {**TALK, 'messages': {'0': USER}}, 'messages'),
    ('/v1/embeddings', {**VECTORS, 'input': {}}, 'input'),
    ('/v1/embeddings', {**VECTORS, 'input': [None]}, 'input'),
    ('/v1/embeddings', {**VECTORS, 'input': [['a']]}, 'input'),
    ('/v1/embeddings', {**VECTORS, 'input': [[]]}, 'input'),
    ('/v1/embeddings', {**VECTORS, 'input': ['a', 7]}, 'input'),
    ('/v1/embeddings', {**VECTORS, 'dimensions': 10**40}, 'dimensions'),
    ('/detokenize', {'model': 'base', 'tokens': [10**40]}, 'tokens[0]'),
    ('/detokenize', {'model': 'base', 'tokens': 'a'}, 'tokens'),
    ('/v1/adapters', {'name': 'a', 'path': 7}, 'path'),
    ('/v1/adapters', {'name': ['a'], 'path': 'b'}, 'name'),
  ],
)
def test_values_of_odd_types_are_refused_by_name(client, path, body, param):
  assert refused(client, path, body)['param'] == param


@pytest.mark.parametrize('value', [b'NaN', b'Infinity', b'-Infinity', b'1e999'])
def test_numbers_that_are_not_finite_are_refused(client, value):
  raw = b'{"model": "base", "prompt": "a", "temperature": ' + value + b'}'
  refused(client, COMPLETIONS, raw)
  raw = (
    b'{"model": "base", "prompt": "a", "response_format": {"type": '
    b'"json_schema", "json_schema": {"name": "a", "schema": {"type": "number", '
    b'"minimum": ' + value + b'}}}}'
  )
  refused(client, COMPLETIONS, raw)


@pytest.mark.parametrize('depth', [101, 990, 100_000])
def test_a_body_that_is_nested_deeply_is_refused(client, depth):
  raw = b'{"model": "base", "prompt": ' + b'[' * depth + b']' * depth + b'}'
  assert 'nested too deeply' in refused(client, COMPLETIONS, raw)['message']


@pytest.mark.parametrize('streamed', [False, True])
def test_half_a_surrogate_that_a_model_writes_is_text(client, streamed):
  tools = [{'type': 'function', 'function': {'name': 'f'}}]
  for call in (
    '{"name": "\\ud800", "arguments": {}}',
    '{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud800\\"}"}',
    '{"name": "f", "arguments": "\\udc00"}',
  ):
    text = f'<tool_call>{call}</tool_call>'
    client.engine.answer = lambda request, text=text: [*ids_of(text), END]
    service = client.service
    service.tool_planner, calling = (
      type(service.tool_planner)(None),
      service.tool_planner,
    )
    try:
      body = {**TALK, 'tools': tools, 'stream': streamed}
      raw = json.dumps(body).encode()
      status, _, answer = client.send('POST', CHAT, raw)
    finally:
      service.tool_planner = calling
      del client.engine.answer
      client.engine.answer = lambda request: [*request.prompt_ids[-5:], END]
    assert status == 200 and b'server_error' not in answer, answer
    assert b'<tool_call>' in answer or b'tool_call' in answer


def test_a_call_whose_name_cannot_be_sent_is_content():
  parser = tool_parser.ToolCallParser(CALL_FORMATS['hermes'], ('f',))
  text = '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'
  events = parser.feed(text) + parser.finish()
  assert ''.join(event.text for event in events) == text


# What an adapter's files may hold in place of anything.
ODD = (None, True, 7, -1, 1e308, 'a', '', [], ['a', 7], {}, {'a': []})


def spoiled(card):
  """The card with each of its values replaced by each odd one."""
  for key in card:
    for value in ODD:
      if value != card[key]:
        yield {**card, key: value}
    if isinstance(card[key], dict):
      for inner in spoiled(card[key]):
        yield {**card, key: inner}
  yield from ([], 7, None, 'a')


@pytest.fixture(scope='module')
def adapter(tmp_path_factory):
  """(base, directory of an adapter of it)."""
  config = DecoderConfig(
    vocab=7, d_model=5, heads=3, kv_heads=1, head_dim=2, ffn=11, layers=2
  )
  base = banked.base_of(config)
  folder = tmp_path_factory.mktemp('adapter')
  banked.save(folder / 'own', base, 'lora(rank=3)')
  return base, folder / 'own'


def test_adapters_whose_card_has_odd_types_are_a_400(
  client, adapter, monkeypatch, caplog
):
  base, folder = adapter

  def load(name, path):
    adapter_ = read_adapter(path, base)
    return api.LoadedAdapter(
      name, adapter_.built.method, adapter_.sha256, 1, path
    )

  monkeypatch.setattr(client.engine, 'load', load)
  card = json.loads((folder / 'adapter.json').read_text())
  body = {'name': 'a', 'path': str(folder)}
  assert post(client, '/v1/adapters', body)[0] == 200
  try:
    for odd in [*spoiled(copy.deepcopy(card))][::3]:
      (folder / 'adapter.json').write_text(json.dumps(odd))
      status, answer = post(client, '/v1/adapters', body)
      # A card may say the same in other words.
      assert status in (200, 400), (odd, answer)
      if status == 400:
        assert answer['error']['param'] == 'path'
  finally:
    (folder / 'adapter.json').write_text(json.dumps(card))


def test_an_adapter_whose_reading_fails_oddly_is_a_400(
  client, monkeypatch, caplog
):
  for error in (TypeError('a'), KeyError('a'), AttributeError('a')):

    def load(name, path, error=error):
      raise error

    monkeypatch.setattr(client.engine, 'load', load)
    error = refused(client, '/v1/adapters', {'name': 'a', 'path': 'runs/a'})
    assert error['param'] == 'path'
  # Whoever runs the server sees where.
  assert 'Traceback' in caplog.text


@pytest.mark.parametrize(
  'error',
  [
    MemoryError(),
    RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.'),
  ],
)
def test_an_adapter_for_which_there_is_no_memory_is_a_507(
  client, monkeypatch, error
):
  def load(name, path):
    raise error

  monkeypatch.setattr(client.engine, 'load', load)
  body = {'name': 'a', 'path': 'runs/a'}
  assert 'memory' in refused(client, '/v1/adapters', body, 507)['message']


def test_an_engine_that_has_stopped_loads_nothing_and_says_so(
  client, monkeypatch
):
  def stopped(*args):
    raise api.RequestRefused('the engine has been stopped')

  monkeypatch.setattr(client.engine, 'load', stopped)
  monkeypatch.setattr(client.engine, 'unload', stopped)
  refused(client, '/v1/adapters', {'name': 'a', 'path': 'runs/a'}, 503)
  refused(client, '/v1/adapters/unload', {'name': 'a'}, 503)


@pytest.mark.parametrize('kind', ['pipe', 'socket', 'device'])
@pytest.mark.parametrize(
  'name',
  [
    '',
    'adapter.json',
    'adapter.safetensors',
    'chat_template.jinja',
    'config.json',
    'checkpoints/7/state',
  ],
)
def test_an_adapter_that_is_no_regular_file_is_refused_at_once(
  client, adapter, tmp_path, monkeypatch, kind, name
):
  base, folder = adapter
  monkeypatch.setattr(
    client.engine, 'load', lambda name, path: read_adapter(path, base)
  )
  path = tmp_path / 'a'
  special = path / name if name else path
  special.parent.mkdir(parents=True, exist_ok=True)
  for file in ('adapter.json', 'adapter.safetensors') if name else ():
    (path / file).write_bytes((folder / file).read_bytes())
  special.unlink(missing_ok=True)
  with socket.socket(socket.AF_UNIX) as sock:
    if kind == 'pipe':
      os.mkfifo(special)
    elif kind == 'device':
      special.symlink_to('/dev/zero')
    else:
      # A socket's path is short: it is made where the process stands.
      monkeypatch.chdir(special.parent)
      sock.bind(special.name)
    body = {'name': 'a', 'path': str(path)}
    raw = json.dumps(body).encode()
    status, _, answer = client.send('POST', '/v1/adapters', raw, seconds=5)
  assert status == 400, answer
  assert f'it is a {kind}'.replace('a pipe', 'a named pipe') in answer.decode()
