# SPDX-License-Identifier: Apache-2.0
"""Soft prompts behind the API: what clients see of them, which is little."""

import dataclasses

import pytest

from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig
from moepeft.nn.adapter_hook import AdapterMap

from ...contracts import small_decoders
from ...inference import banked
from ..small_server import running, service

PLACES = 40
# Bytes need 259 ids.
CONFIG = dataclasses.replace(
  small_decoders.CONFIGS['llama'], vocab=263, length=PLACES, layers=1
)


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  folder = tmp_path_factory.mktemp('served')
  base = banked.base_of(CONFIG)
  path, *_ = banked.save(folder / 'soft', base, 'prompt(length=5)')
  banks = AdapterPool(base, {'soft': path}, slots=2)
  settings = EngineConfig(
    slots=2,
    max_model_len=PLACES,
    cache_lens=(PLACES,),
    chunk=8,
    min_chunk=8,
    batch_sizes=(2,),
  )
  model = banked.model_of(base, AdapterMap())
  engine = Engine(model, base.params, banks, settings)
  # Before the server, which is not waited for as long.
  engine.start()
  with running(service(engine, ByteTokenizer()), started=False) as client_:
    yield client_


def complete(client, prompt, **fields):
  return client.complete(prompt, model='soft', temperature=0, **fields)


def test_usage_counts_what_the_user_gave(client):
  status, answer = complete(client, 'hello', max_tokens=3)
  assert status == 200
  used = answer['usage']
  assert used['prompt_tokens'] == 5
  assert used['total_tokens'] == 5 + used['completion_tokens']
  _, again = complete(client, 'hello', max_tokens=3)
  # All but the last: the prompt's are not told.
  assert again['usage']['prompt_tokens_details'] == {'cached_tokens': 4}


def test_echo_has_the_users_tokens_with_their_places(client):
  fields = {'echo': True, 'logprobs': 1, 'max_tokens': 0}
  _, answer = complete(client, 'hello', **fields)
  (choice,) = answer['choices']
  assert choice['text'] == 'hello'
  response = choice['logprobs']
  assert response['tokens'] == list('hello')
  assert response['text_offset'] == [0, 1, 2, 3, 4]
  assert response['token_logprobs'][0] is None
  _, base = client.complete('hello', temperature=0, **fields)
  plain = base['choices'][0]['logprobs']['token_logprobs']
  pairs = zip(response['token_logprobs'], plain, strict=True)
  assert all(a != b for a, b in pairs if b is not None)


@pytest.mark.parametrize('token', [263, 267, 300])
def test_placeholders_are_no_tokens_of_users(client, token):
  for model in ('soft', 'base'):
    status, answer = client.complete([100, token], model=model)
    assert status == 400
    assert f'holds the token {token}' in answer['error']['message']


def test_a_prompts_places_are_not_for_text(client):
  # Of 40 places five are the prompt's.
  status, answer = complete(client, 'a' * 36, max_tokens=1)
  assert status == 400
  assert answer['error']['code'] == 'context_length_exceeded'
  message = answer['error']['message']
  assert 'its soft prompt 5' in message and 'takes 40' in message
  assert complete(client, 'a' * 34, max_tokens=1)[0] == 200
  assert client.complete('a' * 36, max_tokens=1)[0] == 200
  # As many as there is room for, where none is said.
  status, answer = complete(client, 'a' * 30)
  assert status == 200 and answer['usage']['completion_tokens'] <= 5
  _, response = client.post('/tokenize', {'model': 'soft', 'prompt': 'ab'})
  assert response['count'] == 2 and response['max_model_len'] == 35


def test_the_list_of_adapters_tells_how_long_a_prompt_is(client):
  _, answer = client.get('/v1/adapters')
  assert [
    (entry['id'], entry['soft_prompt_length']) for entry in answer['data']
  ] == [('soft', 5)]
