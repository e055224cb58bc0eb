# SPDX-License-Identifier: Apache-2.0
"""Stop strings that are special tokens, which are no text of an answer."""

import json
import pathlib

import pytest

from tests.serve.fake_engine import END
from tests.serve.in_process import in_process
from tests.serve.small_server import byte_tokenizer, fake

MODEL = pathlib.Path('../shared/cases/034/model')
SPECIAL = ('<|user|>', '<|end|>', '<|user|>x')


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  path = tmp_path_factory.mktemp('words')
  words = byte_tokenizer(path)
  words.tokenizer.add_special_tokens(
    {'additional_special_tokens': list(SPECIAL)}
  )
  with in_process(fake(words)) as made:
    made.words = words
    made.ids = {
      text: words.tokenizer.convert_tokens_to_ids(text) for text in SPECIAL
    }
    made.engine.vocab = max(made.ids.values()) + 1
    yield made


def ask(client, said, stop, stream=False, **fields):
  """(text, why it ended) where the model says ids and texts."""
  ids = []
  for piece in said:
    ids += [piece] if isinstance(piece, int) else client.words.encode(piece)
  client.engine.answer = lambda request: [*ids, END]
  body = {'model': 'base', 'prompt': 'q', 'stop': stop, 'max_tokens': 100}
  raw = json.dumps(body | fields | {'stream': stream}).encode()
  status, _, content = client.send('POST', '/v1/completions', raw)
  assert status == 200, content
  if not stream:
    (choice,) = json.loads(content)['choices']
    return choice['text'], choice['finish_reason']
  events = [
    json.loads(line.removeprefix('data: '))['choices'][0]
    for line in content.decode().split('\n\n')[:-2]
  ]
  assert events[-1]['finish_reason']
  return ''.join(e['text'] for e in events), events[-1]['finish_reason']


@pytest.mark.parametrize('stream', [False, True])
def test_a_special_token_stops_an_answer(client, stream):
  user, end = client.ids['<|user|>'], client.ids['<|end|>']
  said = ['one', user, 'two', end, 'three']
  assert ask(client, said, [], stream) == ('onetwothree', 'stop')
  assert ask(client, said, '<|user|>', stream) == ('one', 'stop')
  assert ask(client, said, ['<|end|>'], stream) == ('onetwo', 'stop')
  assert ask(client, said, ['<|end|>', '<|user|>'], stream) == ('one', 'stop')
  assert ask(client, said, ['none', 'thr'], stream) == ('onetwo', 'stop')


@pytest.mark.parametrize('stream', [False, True])
def test_special_tokens_and_text_stop_together(client, stream):
  user, end = client.ids['<|user|>'], client.ids['<|end|>']
  said = ['a\n', user, 'b', end, user, '\nc', user, '\nd']
  # The first <|user|> has 'b' after it, the second '\nc'.
  assert ask(client, said, '<|user|>\nc', stream) == ('a\nb', 'stop')
  assert ask(client, said, '<|user|>\nd', stream) == ('a\nb\nc', 'stop')
  assert ask(client, said, '\n<|user|>', stream) == ('a', 'stop')
  assert ask(client, said, '<|end|><|user|>', stream) == ('a\nb', 'stop')
  assert ask(client, said, 'b<|end|>', stream) == ('a\n', 'stop')
  # Never side by side in this order.
  text, _ = ask(client, said, '<|user|><|end|>', stream)
  assert text == 'a\nb\nc\nd'


def test_a_special_token_that_is_within_another_is_not_met_in_it(client):
  longer = client.ids['<|user|>x']
  assert ask(client, ['a', longer, 'b'], '<|user|>') == ('ab', 'stop')
  assert ask(client, ['a', longer, 'b'], '<|user|>x') == ('a', 'stop')
  # The bar is in the token's name and in no text.
  assert ask(client, ['a', longer, 'b|c'], '|') == ('ab', 'stop')


def test_what_is_spelled_out_stops_too(client):
  letters = [byte + 3 for byte in b'a<|user|>b']
  assert ask(client, letters, '<|user|>') == ('a', 'stop')


def test_offsets_count_the_characters_that_are_there(client):
  user = client.ids['<|user|>']
  client.engine.answer = lambda request: [100, user, 101, 102, END]
  body = {'model': 'base', 'prompt': 'q', 'stop': '<|user|>z', 'logprobs': 1}
  raw = json.dumps(body).encode()
  _, _, content = client.send('POST', '/v1/completions', raw)
  (choice,) = json.loads(content)['choices']
  assert choice['text'] == 'abc'
  # Of a, <|user|>, b, c and the end.
  assert choice['logprobs']['text_offset'] == [0, 1, 1, 2, 3]


@pytest.mark.skipif(not MODEL.is_dir(), reason='needs ../shared/cases')
def test_the_reported_model_stops_at_its_user():
  from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer

  words = HuggingFaceTokenizer(str(MODEL))
  user = words.tokenizer.convert_tokens_to_ids('<|user|>')
  with in_process(fake(words)) as client:
    client.words = words
    said = ['Hello.', user, 'More']
    text, reason = ask(client, said, ['<|user|>'], prompt=[5])
    assert text.strip() == 'Hello.' and reason == 'stop'
