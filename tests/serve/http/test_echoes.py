# SPDX-License-Identifier: Apache-2.0
"""Clients that send an answer back with fields of their own in it."""

import json

import pytest

from tests.serve.in_process import in_process
from tests.serve.small_server import byte_tokenizer, fake

USER = {'role': 'user', 'content': 'a'}


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  words = byte_tokenizer(tmp_path_factory.mktemp('words'))
  with in_process(fake(words)) as client_:
    yield client_


def ask(client, answer):
  """(status, JSON) of a second turn, after an answer of the first."""
  body = {'model': 'base', 'messages': [USER, answer, USER], 'max_tokens': 3}
  raw = json.dumps(body).encode()
  status, _, content = client.send('POST', '/v1/chat/completions', raw)
  return status, json.loads(content)


@pytest.mark.parametrize(
  'fields',
  [
    {'provider_specific_fields': None},
    {'provider_specific_fields': {}},
    {'provider_specific_fields': {'refusal': None, 'citations': []}},
    {'reasoning': None, 'refusal': None, 'audio': None, 'function_call': None},
    {
      'annotations': [],
      'tool_calls': [],
      'images': [],
      'thinking_blocks': None,
    },
    {'reasoning_details': [{}], 'parsed': None, 'audio': {}, 'name': None},
    {'annotations': [{'type': 'url_citation'}]},
  ],
)
def test_empty_fields_of_an_echoed_answer_say_nothing(client, fields):
  plain = {'role': 'assistant', 'content': 'b'}
  assert ask(client, plain)[0] == 200
  prompt = client.engine.requests[-1].prompt_ids
  status, answer = ask(client, {**plain, **fields})
  assert status == 200, answer
  assert client.engine.requests[-1].prompt_ids == prompt


@pytest.mark.parametrize(
  'fields, param',
  [
    ({'reasoning': 'hm'}, 'messages[1].reasoning'),
    (
      {'provider_specific_fields': {'signature': 'x'}},
      'messages[1].provider_specific_fields',
    ),
    ({'audio': {'id': 'x'}}, 'messages[1].audio'),
    ({'function_call': {'name': 'f'}}, 'messages[1].function_call'),
    ({'images': [{'url': 'x'}]}, 'messages[1].images'),
    ({'weight': 0}, 'messages[1].weight'),
    ({'trained': False}, 'messages[1].trained'),
  ],
)
def test_a_field_that_means_something_is_refused_by_name(client, fields, param):
  status, answer = ask(client, {'role': 'assistant', 'content': 'b', **fields})
  assert status == 400
  assert answer['error']['param'] == param


def test_empty_fields_within_parts_and_calls_say_nothing_either(client):
  function = {'name': 'f', 'arguments': '{}', 'provider': None}
  call = {'id': 'x', 'type': 'function', 'function': function, 'extra': {}}
  part = {'type': 'text', 'text': 'b', 'cache_control': None, 'annotations': []}
  answer = {'role': 'assistant', 'content': [part], 'tool_calls': [call]}
  assert ask(client, answer)[0] == 200
  part['cache_control'] = {'type': 'ephemeral'}
  status, error = ask(client, answer)
  assert status == 400 and 'cache_control' in error['error']['param']
