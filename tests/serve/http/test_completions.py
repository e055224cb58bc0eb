# SPDX-License-Identifier: Apache-2.0
"""Completions in the legacy form, with what evaluation harnesses read."""

import pytest

from tests.serve.fake_engine import END, ids_of
from tests.serve.small_server import fake, running

PATH = '/v1/completions'


@pytest.fixture(scope='module')
def client():
  with running(fake()) as logprobs:
    yield logprobs


@pytest.fixture
def set_answer(client):
  before = client.engine.answer

  def set_text(text):
    client.engine.answer = lambda request: [*ids_of(text), END]

  yield set_text
  client.engine.answer = before


@pytest.mark.parametrize(
  'prompt, texts',
  [
    ('abc', ['abc']),
    (['abc', 'de'], ['abc', 'de']),
    (ids_of('abc'), ['abc']),
    ([ids_of('abc'), ids_of('de')], ['abc', 'de']),
  ],
)
def test_a_prompt_is_text_or_ids_one_or_several(client, prompt, texts):
  # The fake says what it was asked.
  status, answer = client.complete(prompt)
  assert status == 200
  choices = answer['choices']
  assert [choice['text'] for choice in choices] == texts
  assert [choice['index'] for choice in choices] == list(range(len(texts)))
  assert answer['usage']['prompt_tokens'] == sum(map(len, texts))


def test_choices_are_ordered_by_prompt_and_then_by_answer(client):
  _, answer = client.complete(['a', 'b'], n=2)
  texts = [choice['text'] for choice in answer['choices']]
  assert texts == ['a', 'a', 'b', 'b']


def test_a_prompt_that_is_asked_twice_is_drawn_twice(client):
  fields = {'n': 2, 'temperature': 1.0}
  client.complete(['a', 'a'], **fields)
  seeds = [request.seed for request in client.engine.requests[-4:]]
  assert len(set(seeds)) == 4
  # What is named holds for each prompt, whatever is beside it.
  client.complete(['a', 'b'], seed=5, **fields)
  seeds = [request.seed for request in client.engine.requests[-4:]]
  assert seeds[:2] == seeds[2:] and seeds[0] == 5 != seeds[1]


def test_an_answer_has_16_tokens_where_no_length_is_given(client, set_answer):
  set_answer('x' * 99)
  _, answer = client.complete()
  assert answer['choices'][0]['text'] == 'x' * 16
  assert answer['choices'][0]['finish_reason'] == 'length'


def test_log_probabilities_are_lists_as_long_as_the_tokens(client, set_answer):
  set_answer('yz')
  _, answer = client.complete('ab', logprobs=2)
  logprobs = answer['choices'][0]['logprobs']
  # The end is a token here: harnesses count what was generated.
  assert logprobs['tokens'] == ['y', 'z', '']
  # 'y' is the byte 121, its id 124, its log-probability -1.24.
  assert logprobs['token_logprobs'] == [-1.24, -1.25, -0.01]
  assert logprobs['top_logprobs'][0] == {'y': -1.24, '\x02': -2.0}
  assert logprobs['text_offset'] == [0, 1, 2]


def test_echo_scores_the_prompt_from_its_second_token_on(client):
  _, answer = client.complete('abc', echo=True, logprobs=1, max_tokens=1)
  (choice,) = answer['choices']
  assert choice['text'] == 'abca'
  logprobs = choice['logprobs']
  assert logprobs['tokens'] == ['a', 'b', 'c', 'a']
  assert logprobs['token_logprobs'] == [None, -1.01, -1.02, -1.0]
  assert logprobs['top_logprobs'][0] is None
  assert logprobs['text_offset'] == [0, 1, 2, 3]


def test_a_harness_finds_a_continuation_by_counting_tokens(client, set_answer):
  # As lm-eval does: ids, one token more, and that one left out again.
  context, continuation = ids_of('question'), ids_of('ans')
  set_answer('')
  _, answer = client.complete(
    [context + continuation], echo=True, logprobs=1, max_tokens=1
  )
  logprobs = answer['choices'][0]['logprobs']
  scored = logprobs['token_logprobs'][len(context) : -1]
  assert scored == [-i / 100 for i in continuation]
  tops = logprobs['top_logprobs'][len(context) : -1]
  greedy = [
    token_logprob == max(top.values())
    for token_logprob, top in zip(scored, tops, strict=True)
  ]
  assert greedy == [True] * 3


def test_max_tokens_0_with_echo_is_the_prompt_alone(client):
  request_count = len(client.engine.requests)
  _, answer = client.complete('abc', echo=True, max_tokens=0)
  assert answer['choices'][0]['text'] == 'abc'
  # Nothing is scored, so there is nothing to compute.
  assert len(client.engine.requests) == request_count
  _, answer = client.complete('abc', echo=True, max_tokens=0, logprobs=1)
  assert answer['choices'][0]['logprobs']['tokens'] == ['a', 'b', 'c']
  assert answer['usage']['completion_tokens'] == 0


def test_offsets_count_characters_and_parts_of_one_share_its_place(client):
  _, answer = client.complete('aßb', echo=True, logprobs=0, max_tokens=0)
  logprobs = answer['choices'][0]['logprobs']
  assert logprobs['tokens'] == ['a', 'bytes:\\xc3', 'bytes:\\x9f', 'b']
  assert logprobs['text_offset'] == [0, 1, 1, 2]
  # With 0 alternatives there is the token alone.
  assert logprobs['top_logprobs'][3] == {'b': -1.01}


def test_a_stream_echoes_its_prompt_first(client):
  for logprobs in (None, 1):
    body = dict(model='base', prompt='abc', echo=True, stream=True)
    events, done = client.events(PATH, body | {'logprobs': logprobs})
    assert done
    choices = [event['choices'][0] for event in events]
    assert ''.join(choice['text'] for choice in choices) == 'abcabc'
    assert choices[-1]['finish_reason'] == 'stop'
  parts = [choice['logprobs'] for choice in choices]
  offsets = [at for part in parts for at in part['text_offset']]
  assert offsets == [0, 1, 2, 3, 4, 5, 6]


def test_an_answer_that_begins_inside_a_character_ends_it(client):
  # The prompt is a byte of 'ß', and the answer its other one.
  before = client.engine.answer
  client.engine.answer = lambda request: [ids_of('ß')[1], END]
  _, answer = client.complete(ids_of('aß')[:2])
  client.engine.answer = before
  assert answer['choices'][0]['text'] == 'ß'


def test_a_stop_string_cuts_tokens_and_text_alike(client, set_answer):
  set_answer('abc.def')
  _, answer = client.complete(stop='.', logprobs=0, echo=True)
  (choice,) = answer['choices']
  assert choice['text'] == 'helloabc'
  assert choice['logprobs']['tokens'] == list('helloabc')
  assert choice['finish_reason'] == 'stop'


def test_a_requests_task_and_embedding_reach_the_engine(client):
  status, _ = client.complete('abc', task='law', embedding=[1, 0.5])
  request = client.engine.requests[-1]
  assert status == 200
  assert (request.task, request.embedding) == ('law', (1.0, 0.5))
  status, answer = client.complete('abc', embedding=['a'])
  assert status == 400 and 'embedding' in answer['error']['message']
