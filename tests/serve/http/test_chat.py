# SPDX-License-Identifier: Apache-2.0
"""Chat: prompts by the template, whole and streamed answers."""

import base64

import numpy as np
import pytest

from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from tests.serve.fake_engine import END, ids_of, text_of
from tests.serve.small_server import byte_tokenizer, fake, running

CHAT = '/v1/chat/completions'


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  words = byte_tokenizer(tmp_path_factory.mktemp('words'))
  with running(fake(words)) as value:
    yield value


@pytest.fixture
def set_answer(client):
  """Sets what the engine answers; afterwards it is as it was."""
  before = client.engine.answer

  def set_text(text, end=True):
    client.engine.answer = lambda request: [*ids_of(text), *[END] * end]

  yield set_text
  client.engine.answer = before


def last_prompt(client):
  """The text of the newest prompt at the engine."""
  return text_of(client.engine.requests[-1].prompt_ids)


def talk(content='hi', **fields):
  messages = [{'role': 'user', 'content': content}]
  return {'model': 'base', 'messages': messages, **fields}


def test_turns_become_a_prompt_by_the_template(client):
  messages = [
    {'role': 'developer', 'content': 'be kind'},
    {'role': 'user', 'content': [{'type': 'text', 'text': 'a'}] * 2},
    {'role': 'assistant', 'content': 'b', 'refusal': None, 'audio': None},
    {'role': 'tool', 'content': 'c', 'tool_call_id': 'x'},
  ]
  status, _ = client.post(CHAT, {'model': 'base', 'messages': messages})
  assert status == 200
  # The developer is the system; parts of text are one text.
  assert last_prompt(client) == 's:be kind|u:aa|a:b|t:c|a:'


def test_pictures_are_refused(client):
  part = {'type': 'image_url', 'image_url': {'url': 'data:'}}
  status, answer = client.post(CHAT, talk([part]))
  assert status == 400
  assert 'messages[0].content' in answer['error']['param']


def test_a_whole_answer_has_the_form_of_openai(client, set_answer):
  set_answer('grüße')
  status, answer = client.post(CHAT, talk(temperature=0))
  assert status == 200
  assert answer['object'] == 'chat.completion'
  assert answer['model'] == 'base'
  assert answer['system_fingerprint'].startswith('fp_')
  (choice,) = answer['choices']
  assert choice['message']['role'] == 'assistant'
  assert choice['message']['content'] == 'grüße'
  assert choice['finish_reason'] == 'stop'
  # The prompt is 'u:hi|a:'; 5 letters of which two have two bytes, and END.
  usage = answer['usage']
  assert (usage['prompt_tokens'], usage['completion_tokens']) == (7, 8)
  assert usage['total_tokens'] == 15


def test_an_answer_that_is_cut_ends_by_length(client, set_answer):
  set_answer('abcdef')
  for field in ('max_tokens', 'max_completion_tokens'):
    _, answer = client.post(CHAT, talk(**{field: 3}))
    (choice,) = answer['choices']
    assert choice['message']['content'] == 'abc'
    assert choice['finish_reason'] == 'length'


def test_without_a_length_an_answer_has_the_room_that_is_left(client):
  client.post(CHAT, talk())
  # 512 places less the 7 of the prompt.
  assert client.engine.requests[-1].max_new_tokens == 505


def streamed(client, **fields):
  events, done = client.events(CHAT, talk(stream=True, **fields))
  assert done
  return events


def contents(events, index=0):
  return [
    choice['delta'].get('content') or ''
    for event in events
    for choice in event['choices']
    if choice['index'] == index
  ]


def test_a_stream_is_the_whole_answer_in_parts(client, set_answer):
  set_answer('grüße 🎈 日本')
  client.engine.pause = 0.002
  events = streamed(client, stream_options={'include_usage': True})
  client.engine.pause = 0.0
  assert ''.join(contents(events)) == 'grüße 🎈 日本'
  # Parts, not all at once: the engine pauses after each token.
  assert len([part for part in contents(events) if part]) > 3
  assert events[0]['choices'][0]['delta'] == {
    'role': 'assistant',
    'content': '',
  }
  assert {event['id'] for event in events} == {events[0]['id']}
  assert events[-2]['choices'][0]['finish_reason'] == 'stop'
  assert events[-2]['usage'] is None
  assert events[-1]['choices'] == []
  # 2 + 4 + 3 + 3 bytes beyond ASCII: g r ü ß e _ 🎈 _ 日 本, and END.
  assert events[-1]['usage']['completion_tokens'] == 3 + 4 + 2 + 4 + 6 + 1


def test_no_part_of_a_stream_holds_half_a_character(client, set_answer):
  set_answer('äöü🎈日本語' * 5)
  # One token a step: each is a byte, so most steps end inside a character.
  client.engine.pause = 0.001
  events = streamed(client)
  client.engine.pause = 0.0
  assert '\ufffd' not in ''.join(contents(events))
  assert ''.join(contents(events)) == 'äöü🎈日本語' * 5


def test_bytes_that_never_become_a_character_are_marked_at_the_end(client):
  before = client.engine.answer
  client.engine.answer = lambda request: [*ids_of('a🎈')[:3], END]
  events = streamed(client)
  client.engine.answer = before
  assert ''.join(contents(events)) == 'a\ufffd'


def test_without_the_option_no_usage_is_in_a_stream(client):
  assert all('usage' not in event for event in streamed(client))


@pytest.mark.parametrize('stream', [False, True])
def test_an_answer_is_cut_before_a_stop_string_and_its_slot_freed(
  client, set_answer, stream
):
  # The rest would take the engine 400 tokens more.
  set_answer('one, two, three' + 'x' * 400, end=False)
  client.engine.pause = 0.001
  fields = dict(stop=[' thr', 'zzz'], stream=stream)
  if stream:
    events = streamed(client, stop=[' thr', 'zzz'])
    text = ''.join(contents(events))
    reason = events[-1]['choices'][0]['finish_reason']
  else:
    _, answer = client.post(CHAT, talk(**fields))
    text = answer['choices'][0]['message']['content']
    reason = answer['choices'][0]['finish_reason']
  client.engine.pause = 0.0
  assert (text, reason) == ('one, two,', 'stop')
  assert client.engine.idle()
  assert client.engine.cancelled[-1] == client.engine.requests[-1].id


def test_log_probabilities_are_of_the_text_alone(client, set_answer):
  set_answer('ab. c')
  fields = dict(logprobs=True, top_logprobs=2, stop='.')
  _, answer = client.post(CHAT, talk(**fields))
  content = answer['choices'][0]['logprobs']['content']
  # The stop string is no text, so its token is not scored either.
  assert [entry['token'] for entry in content] == ['a', 'b']
  # Of id i it is -i / 100; the byte 'a' is 97, its id 100.
  assert content[0]['logprob'] == -1.0
  assert content[0]['bytes'] == [97]
  assert [entry['logprob'] for entry in content[0]['top_logprobs']] == [
    -1.0,
    -2.0,
  ]
  events = streamed(client, **fields)
  parts = [e['choices'][0]['logprobs'] for e in events]
  tokens = [
    entry['token'] for part in parts if part for entry in part['content']
  ]
  assert tokens == ['a', 'b']


def test_parts_of_a_character_are_scored_each_with_its_bytes(
  client, set_answer
):
  set_answer('ß')
  _, answer = client.post(CHAT, talk(logprobs=True))
  content = answer['choices'][0]['logprobs']['content']
  assert [entry['bytes'] for entry in content] == [[0xC3], [0x9F]]
  assert content[0]['top_logprobs'] == []


def test_several_answers_have_seeds_of_their_own(client):
  _, answer = client.post(CHAT, talk(n=3, seed=5, temperature=0.5))
  assert [choice['index'] for choice in answer['choices']] == [0, 1, 2]
  seeds = [request.seed for request in client.engine.requests[-3:]]
  assert seeds[0] == 5 and len(set(seeds)) == 3
  client.post(CHAT, talk(n=3, seed=5, temperature=0.5))
  assert [request.seed for request in client.engine.requests[-3:]] == seeds
  client.post(CHAT, talk(n=1, seed=6))
  assert client.engine.requests[-1].seed == 6 and 6 not in seeds


def test_several_answers_are_streamed_side_by_side(client):
  events = streamed(client, n=2)
  for index in (0, 1):
    # The fake says the prompt's last five characters: 'u:hi|a:'.
    assert ''.join(contents(events, index)) == 'hi|a:'


def test_sampling_is_what_was_asked_for(client):
  client.post(CHAT, talk())
  # OpenAI's default.
  assert client.engine.requests[-1].sampling.temperature == 1.0
  client.post(CHAT, talk(temperature=0, top_p=0.5, top_k=3))
  value = client.engine.requests[-1].sampling
  assert (value.temperature, value.top_p, value.top_k) == (None, None, None)
  fields = dict(top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.5)
  client.post(CHAT, talk(temperature=0.7, **fields))
  value = client.engine.requests[-1].sampling
  assert value.temperature == 0.7
  assert {name: getattr(value, name) for name in fields} == fields


@pytest.mark.parametrize('path', [CHAT, '/v1/completions'])
def test_penalties_of_counts_and_a_bias_reach_the_engine(client, path):
  body = {'model': 'base', 'prompt': 'a'} if path != CHAT else talk()
  fields = dict(frequency_penalty=-0.5, presence_penalty=2)
  status, _ = client.post(path, body | fields | {'logit_bias': {'7': -100}})
  assert status == 200
  value = client.engine.requests[-1].sampling
  assert {name: getattr(value, name) for name in fields} == fields
  assert value.logit_bias == ((7, -100),)
  # Without effect.
  fields = dict(frequency_penalty=0, presence_penalty=0.0, logit_bias={})
  status, _ = client.post(path, body | fields)
  value = client.engine.requests[-1].sampling
  assert status == 200
  assert (value.frequency_penalty, value.presence_penalty) == (None, None)
  assert value.logit_bias == ()


def test_routing_is_told_a_token_each_where_it_is_asked_for(client, set_answer):
  set_answer('ab')
  _, answer = client.post(CHAT, talk(routing=True))
  assert answer['choices'][0]['routing'] == [
    {'token': 'a', 'experts': {'mlp/wo': [0.625, 0.375]}},
    {'token': 'b', 'experts': {'mlp/wo': [0.625, 0.375]}},
  ]
  events = streamed(client, routing=True)
  parts = [e['choices'][0].get('routing', []) for e in events]
  assert [entry['token'] for part in parts for entry in part] == ['a', 'b']
  _, answer = client.post(CHAT, talk())
  assert 'routing' not in answer['choices'][0]


def test_routing_is_told_of_each_layer_where_it_is_asked_for(client):
  _, answer = client.post(CHAT, talk(routing='layers'))
  entry = answer['choices'][0]['routing'][0]
  # The fake's two layers have one expert and two, 1 and (0.25, 0.75).
  assert entry['experts'] == {'mlp/wo': [0.625, 0.375]}
  weights = np.frombuffer(base64.b64decode(entry['layers']['mlp/wo']), '<f2')
  np.testing.assert_equal(weights, [1, np.nan, 0.25, 0.75])
  _, answer = client.post(CHAT, talk(routing='layer'))
  message = "routing: expected true, false or 'layers'; got 'layer'"
  assert answer['error']['message'] == message


def test_a_failure_amid_a_stream_is_its_last_event(client):
  before = client.engine.answer
  client.engine.answer = lambda request: [*ids_of('ab'), -1]
  events, done = client.events(CHAT, talk(stream=True))
  client.engine.answer = before
  assert not done
  assert ''.join(contents(events[:-1])) == 'ab'
  assert events[-1]['error']['type'] == 'server_error'


def test_a_model_without_a_template_refuses_to_chat():
  with running(fake(ByteTokenizer())) as client:
    status, answer = client.chat()
    assert status == 400
    assert 'chat template' in answer['error']['message']
    assert client.complete()[0] == 200


def test_an_encoder_decoder_reads_turns_as_plain_text():
  value = fake(ByteTokenizer())
  value.engine.decoder_only = value.tokenizer.decoder_only = False
  with running(value) as client:
    assert client.chat('hello')[0] == 200
    # T5's inputs end with the end.
    assert client.engine.requests[-1].prompt_ids == (*ids_of('hello'), END)
    turns = [
      {'role': 'user', 'content': 'a'},
      {'role': 'assistant', 'content': 'b'},
      {'role': 'user', 'content': 'c'},
    ]
    assert client.post(CHAT, {'model': 'base', 'messages': turns})[0] == 200
    assert last_prompt(client).startswith('user: a\nassistant: b\nuser: c')
    status, answer = client.complete('a', echo=True)
    assert status == 400 and answer['error']['param'] == 'echo'
