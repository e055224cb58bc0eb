# SPDX-License-Identifier: Apache-2.0
"""model='auto': an adapter is chosen by the content of a request."""

import json

import pytest

from moepeft.serve.embeddings.chooser import AdapterChooser, read_examples
from moepeft.serve.http.model_registry import ModelRegistry
from tests.serve.fake_engine import ids_of
from tests.serve.small_server import (
  FakeEmbedder,
  byte_tokenizer,
  fake,
  running,
)

CHAT = '/v1/chat/completions'


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  words = byte_tokenizer(tmp_path_factory.mktemp('words'))
  service = fake(words)
  service.embedder = FakeEmbedder()
  # The first has the centroid (1, 0, 0). The mean of the second's (0, 1, 0) and
  # (3, 4, 0) / 5 is (0.3, 0.9, 0), of length one (1, 3, 0) / 10 ** 0.5.
  examples = {'first': ['a', 'aaa'], 'second': ['b', 'aaabbbb']}
  service.chooser = AdapterChooser(service.embedder, examples, 0.5)
  for name in examples:
    service.engine.load(name, f'runs/{name}')
  with running(service) as value:
    yield value


def test_the_adapter_of_the_nearest_examples_answers_and_is_named(client):
  for content, name in (('aa', 'first'), ('bb', 'second')):
    status, answer = client.chat(content, model='auto')
    assert (status, answer['model']) == (200, name)
    assert client.engine.requests[-1].adapter == name
    status, answer = client.complete(content, model='auto')
    assert (status, answer['model']) == (200, name)
    body = {'model': 'auto', 'input': content}
    status, response = client.post('/v1/responses', body)
    assert (status, response['model']) == (200, name)
    assert response['auto'] == answer['auto']
  # 3 / 10 ** 0.5.
  assert answer['auto'] == {
    'similarity': {'first': 0.0, 'second': 0.9487},
    'threshold': 0.5,
  }
  named = client.chat('aa', model='second')[1]
  assert named['model'] == 'second' and 'auto' not in named


@pytest.mark.parametrize('content', ['cc', ' '])
def test_a_text_far_from_all_examples_goes_to_the_base(client, content):
  status, answer = client.chat(content, model='auto')
  assert (status, answer['model']) == (200, 'base')
  assert client.engine.requests[-1].adapter == ''
  similarity = {'first': 0.0, 'second': 0.0} if content == 'cc' else {}
  assert answer['auto']['similarity'] == similarity


def test_a_stream_names_the_adapter_and_says_once_how_it_was_chosen(client):
  body = {'model': 'auto', 'stream': True}
  turn = {'role': 'user', 'content': 'b'}
  for path, fields in (
    (CHAT, {'messages': [turn]}),
    ('/v1/completions', {'prompt': 'b'}),
  ):
    events, done = client.events(path, body | fields)
    assert done and {event['model'] for event in events} == {'second'}
    assert ['auto' in event for event in events] == [
      True,
      *[False] * (len(events) - 1),
    ]


def test_the_users_turns_choose_the_last_one_first(client):
  messages = [
    {'role': 'system', 'content': 'a' * 50},
    {'role': 'user', 'content': 'bbb'},
    {'role': 'assistant', 'content': 'a' * 50},
    {'role': 'user', 'content': 'b, long'},
  ]
  body = {'model': 'auto', 'messages': messages}
  # A text that is longer than the encoder reads is cut, not refused.
  assert client.post(CHAT, body)[1]['model'] == 'second'


def test_several_prompts_and_token_ids_are_one_choice(client):
  prompts = ['ccc', 'bb', 'bb']
  assert client.complete(prompts, model='auto')[1]['model'] == 'second'
  ids = [ids_of(prompt) for prompt in prompts]
  assert client.complete(ids, model='auto')[1]['model'] == 'second'
  status, answer = client.complete([10**6], model='auto')
  assert status == 400 and answer['error']['param'] == 'prompt'


def test_models_list_auto_and_the_adapters_that_are_loaded(client):
  listed = client.get('/v1/models')[1]['data']
  (auto,) = [model for model in listed if model['id'] == 'auto']
  assert (auto['type'], auto['parent']) == ('language', 'base')
  assert auto['chooses'] == ['first', 'second']
  client.engine.unload('second')
  try:
    assert client.get('/v1/models/auto')[1]['chooses'] == ['first']
    # 'bb' has no 'a'.
    assert client.chat('bb', model='auto')[1]['model'] == 'base'
  finally:
    client.engine.load('second', 'runs/second')


def test_other_routes_need_a_name(client):
  status, answer = client.post('/tokenize', {'model': 'auto', 'prompt': 'a'})
  assert status == 400
  assert answer['error']['message'] == (
    "the model 'auto' is chosen by the text of a chat or a completion; here, "
    'name one of base, first, second'
  )


def test_without_examples_there_is_no_model_auto():
  with running(fake()) as client:
    status, answer = client.complete('a', model='auto')
  assert status == 404
  assert answer['error']['message'] == (
    "the model 'auto' does not exist; there are base"
  )


def test_no_other_model_is_called_auto():
  service = fake()
  arguments = (service.engine, 'base', '', None)
  registry = ModelRegistry(*arguments, {'auto': 'the model that chooses'})
  with pytest.raises(
    ValueError, match="^'auto' is the name of the model that c"
  ):
    registry.load('auto', 'runs/law')
  service.engine.stop()


def test_examples_are_lines_or_rows_of_training_data(tmp_path):
  text, rows = tmp_path / 'prompts.txt', tmp_path / 'rows.jsonl'
  text.write_text('How many?\n\n  \nWho?\n')
  assert read_examples(str(text)) == ['How many?', 'Who?']
  turns = [
    {'role': role, 'content': content}
    for role, content in (
      ('system', 'Be kind.'),
      ('user', 'Who?'),
      ('assistant', 'I.'),
      ('user', 'Why?'),
      ('assistant', 'So.'),
    )
  ]
  lines = [{'inputs': 'How many?', 'targets': '2'}, {'messages': turns}]
  rows.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert read_examples(str(rows)) == ['How many?', 'Who?\nWhy?']


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.txt', '\n', 'has no example prompt; write one a line'),
    ('a.txt', 'é', 'is no text in UTF-8; convert it'),
    ('a.jsonl', '', 'has no example prompt; write one a line'),
    ('a.jsonl', '{"text": "x"}\n', 'a.jsonl, line 1: '),
    ('a.jsonl', 'x\n', 'a.jsonl, line 1: '),
    ('', '', ' is no file; expected example prompts, one a line, or rows of'),
  ],
)
def test_other_examples_are_refused_in_one_sentence(
  name, content, message, tmp_path
):
  path = tmp_path / name
  if name:
    path.write_bytes(content.encode('latin-1'))
  with pytest.raises(ValueError) as error:
    read_examples(str(path))
  assert message in str(error.value)
  assert '\n' not in str(error.value)
