# SPDX-License-Identifier: Apache-2.0
"""The `openai` package, unchanged, against the server."""

import json
import math
import operator

import pytest

from moepeft.core.http_access import ApiKeys
from moepeft.serve.http.chat_templates import ChatSettings
from moepeft.serve.http.model_registry import ModelRegistry
from tests.serve.fake_engine import END, ids_of
from tests.serve.small_server import (
  FakeEmbedder,
  byte_tokenizer,
  constrained,
  fake,
  running,
)

openai = pytest.importorskip('openai')
pydantic = pytest.importorskip('pydantic')

TURNS = [{'role': 'user', 'content': 'hi'}]


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  words = byte_tokenizer(tmp_path_factory.mktemp('words'))
  service = constrained(fake(words, keys=ApiKeys((b'secret',), ())), words)
  service.embedder = FakeEmbedder()
  with running(service) as value:
    yield value


@pytest.fixture(scope='module')
def client(server):
  with openai.OpenAI(
    base_url=f'{server.url}/v1', api_key='secret', max_retries=0, timeout=20
  ) as value:
    yield value


def test_models(client, server):
  server.engine.load('law', 'runs/law')
  assert [model.id for model in client.models.list()] == [
    'base',
    'law',
    'vectors',
  ]
  assert client.models.retrieve('law').owned_by == 'moepeft'
  answer = client.chat.completions.create(model='law', messages=TURNS)
  base = client.chat.completions.create(model='base', messages=TURNS)
  assert answer.model == 'law' and server.engine.requests[-2].adapter == 'law'
  assert answer.system_fingerprint != base.system_fingerprint
  # Another adapter under the same name has another fingerprint.
  server.engine.load('law', 'runs/newer')
  again = client.chat.completions.create(model='law', messages=TURNS)
  assert again.system_fingerprint != answer.system_fingerprint
  server.engine.unload('law')
  with pytest.raises(openai.NotFoundError):
    client.chat.completions.create(model='law', messages=TURNS)


def test_the_model_for_embeddings_is_told_from_those_that_write(client, server):
  kinds = {model.id: model.type for model in client.models.list()}
  assert kinds == {'base': 'language', 'vectors': 'embedding'}
  ask = {
    'chat.completions': {'messages': TURNS},
    'completions': {'prompt': 'a'},
  }
  for route, fields in ask.items():
    create = operator.attrgetter(f'{route}.create')(client)
    with pytest.raises(openai.BadRequestError, match='/v1/embeddings') as e:
      create(model='vectors', **fields)
    assert e.value.param == 'model'
  with pytest.raises(openai.BadRequestError, match="name 'vectors'"):
    client.embeddings.create(model='base', input='a')
  with pytest.raises(openai.NotFoundError):
    client.embeddings.create(model='x', input='a')


def test_two_models_do_not_have_one_name(server):
  engine, voice = server.engine, ChatSettings()
  with pytest.raises(ValueError, match='--name'):
    ModelRegistry(engine, 'base', '', voice, {'base': 'the other'})
  value = ModelRegistry(
    engine, 'base', '', voice, {'vectors': 'the model for embeddings'}
  )
  with pytest.raises(ValueError, match='for embeddings'):
    value.load('vectors', 'runs/a')


def test_chat(client):
  answer = client.chat.completions.create(
    model='base', messages=TURNS, logprobs=True, top_logprobs=2, n=2
  )
  assert [choice.message.content for choice in answer.choices] == ['hi|a:'] * 2
  assert answer.choices[0].logprobs.content[0].token == 'h'
  assert answer.usage.prompt_tokens == 7


def test_streamed_chat(client):
  text, usage = '', None
  with client.chat.completions.create(
    model='base',
    messages=TURNS,
    stream=True,
    stream_options={'include_usage': True},
  ) as stream:
    for chunk in stream:
      usage = chunk.usage or usage
      for choice in chunk.choices:
        text += choice.delta.content or ''
  # Five letters and the end.
  assert text == 'hi|a:' and usage.completion_tokens == 6


def test_completions(client):
  answer = client.completions.create(
    model='base', prompt=['ab', 'c'], echo=True, logprobs=1, max_tokens=1
  )
  assert [choice.text for choice in answer.choices] == ['aba', 'cc']
  assert answer.choices[0].logprobs.text_offset == [0, 1, 2]


def test_a_model_of_pydantic_comes_back(client):
  class Answer(pydantic.BaseModel):
    colour: bool

  value = client.chat.completions.parse(
    model='base', messages=TURNS, response_format=Answer
  )
  assert isinstance(value.choices[0].message.parsed, Answer)


def test_tools(client):
  class Weather(pydantic.BaseModel):
    """The weather of a town."""

    warm: bool

  tool = openai.pydantic_function_tool(Weather)
  answer = client.chat.completions.create(
    model='base',
    messages=TURNS,
    tools=[tool],
    tool_choice='required',
    parallel_tool_calls=False,
  )
  message = answer.choices[0].message
  (call,) = message.tool_calls
  assert call.function.name == 'Weather'
  assert json.loads(call.function.arguments)['warm'] in (True, False)
  # The message goes back as it came.
  result = {'role': 'tool', 'tool_call_id': call.id, 'content': 'yes'}
  client.chat.completions.create(
    model='base',
    messages=[*TURNS, message, result],
    tools=[tool],
    tool_choice='none',
  )


def test_embeddings(client):
  for form in ('float', 'base64', openai.omit):
    value = client.embeddings.create(
      model='vectors', input=['aab', 'c'], encoding_format=form
    )
    # Of 'aab' it is (2, 1, 0) over the root of 5.
    first = value.data[0].embedding
    if form == 'base64':
      continue
    assert first == pytest.approx([2 / 5**0.5, 1 / 5**0.5, 0], abs=1e-6)
  assert value.usage.prompt_tokens == 4
  short = client.embeddings.create(
    model='vectors', input='abc', dimensions=2, encoding_format='float'
  )
  # The first two of three equal numbers, of unit length again.
  assert short.data[0].embedding == pytest.approx([0.5**0.5] * 2, abs=1e-6)
  assert math.hypot(*short.data[0].embedding) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
  'fields',
  [
    {'dimensions': 4},
    {'input': 'long'},
    {'input': ''},
    {'input': [1, 2]},
    {'encoding_format': 'int8'},
  ],
)
def test_wrong_embeddings_are_errors(client, fields):
  with pytest.raises(openai.BadRequestError):
    client.embeddings.create(**{'model': 'vectors', 'input': 'a', **fields})


def test_without_a_model_for_embeddings_there_is_none(client, server):
  embedder, server.service.embedder = server.service.embedder, None
  with pytest.raises(openai.NotFoundError, match='--embeddings'):
    client.embeddings.create(model='vectors', input='a')
  server.service.embedder = embedder


def test_errors_are_those_of_the_package(client, server):
  with pytest.raises(openai.AuthenticationError):
    client.with_options(api_key='wrong').models.list()
  with pytest.raises(openai.NotFoundError) as e:
    client.chat.completions.create(model='x', messages=TURNS)
  assert e.value.code == 'model_not_found'
  with pytest.raises(openai.BadRequestError) as e:
    client.completions.create(model='base', prompt='a', suffix='b')
  assert e.value.param == 'suffix'
  original = server.engine.answer
  server.engine.answer = lambda request: [*ids_of('ab'), -1]
  with pytest.raises(openai.InternalServerError):
    client.completions.create(model='base', prompt='a')
  with pytest.raises(openai.APIError, match='the engine failed'):
    list(client.completions.create(model='base', prompt='a', stream=True))
  server.engine.answer = original


def test_leaving_a_stream_frees_its_slot(client, server):
  original = server.engine.answer
  server.engine.answer = lambda request: [*ids_of('x' * 400), END]
  server.engine.pause = 0.02
  stream = client.chat.completions.create(
    model='base', messages=TURNS, stream=True
  )
  next(iter(stream))
  stream.close()
  assert server.engine.idle()
  server.engine.pause, server.engine.answer = 0.0, original
  assert server.engine.cancelled[-1] == server.engine.requests[-1].id


def test_tokens_there_and_back(server):
  server.key = 'secret'
  body = {'model': 'base', 'prompt': 'aß'}
  _, value = server.post('/tokenize', body)
  assert value['tokens'] == ids_of('aß') and value['count'] == 3
  body = {'model': 'base', 'tokens': value['tokens']}
  assert server.post('/detokenize', body)[1] == {'prompt': 'aß'}
  _, value = server.post('/tokenize', {'model': 'base', 'messages': TURNS})
  assert value['tokens'] == ids_of('u:hi|a:')
