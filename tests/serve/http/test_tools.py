# SPDX-License-Identifier: Apache-2.0
"""Calls of tools and constrained answers, through HTTP."""

import json

import pytest

from moepeft.serve.http.tool_calls import ToolPlanner
from tests.serve.fake_engine import END, ids_of, text_of
from tests.serve.small_server import (
  byte_tokenizer,
  constrained,
  fake,
  running,
)

CHAT = '/v1/chat/completions'
TOOL = {
  'type': 'function',
  'function': {
    'name': 'weather',
    'description': 'of a town',
    'parameters': {
      'type': 'object',
      'properties': {'town': {'enum': ['Ulm', 'Rom']}},
      'required': ['town'],
      'additionalProperties': False,
    },
  },
}
CALL = (
  '<tool_call>{"name": "weather", "arguments": {"town": "Ulm"}}</tool_call>'
)


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  words = byte_tokenizer(tmp_path_factory.mktemp('words'))
  with running(constrained(fake(words), words)) as client_:
    yield client_


@pytest.fixture
def set_answer(client, monkeypatch):
  """Sets the engine's answers to requests without a constraint."""

  def set_text(text):
    monkeypatch.setattr(client.engine, 'answer', lambda r: [*ids_of(text), END])
    # The fake follows a constraint by itself; here it is free.
    free = 'moepeft.serve.http.tool_calls.ToolPlan.constraint'
    monkeypatch.setattr(free, lambda self: None)

  return set_text


def talk(**fields):
  messages = [{'role': 'user', 'content': 'hi'}]
  return {'model': 'base', 'messages': messages, 'tools': [TOOL], **fields}


def test_tools_are_in_the_prompt_unless_none_may_be_called(client, set_answer):
  set_answer('no')
  client.post(CHAT, talk())
  assert 'weather' in text_of(client.engine.requests[-1].prompt_ids)
  client.post(CHAT, talk(tool_choice='none'))
  assert 'weather' not in text_of(client.engine.requests[-1].prompt_ids)


def test_a_call_in_an_answer_is_read_out_of_its_text(client, set_answer):
  set_answer(f'I look.\n{CALL}')
  status, answer = client.post(CHAT, talk())
  assert status == 200
  (choice,) = answer['choices']
  assert choice['finish_reason'] == 'tool_calls'
  message = choice['message']
  assert message['content'] == 'I look.'
  (call,) = message['tool_calls']
  assert call['type'] == 'function' and call['id']
  assert call['function']['name'] == 'weather'
  assert json.loads(call['function']['arguments']) == {'town': 'Ulm'}


def test_an_answer_without_a_call_is_content_and_stops(client, set_answer):
  set_answer('just so')
  _, answer = client.post(CHAT, talk())
  (choice,) = answer['choices']
  assert choice['message']['content'] == 'just so'
  assert 'tool_calls' not in choice['message']
  assert choice['finish_reason'] == 'stop'


def test_a_call_alone_has_null_content(client, set_answer):
  set_answer(CALL)
  _, answer = client.post(CHAT, talk())
  assert answer['choices'][0]['message']['content'] is None


def test_a_streamed_call_comes_in_deltas_that_add_up(client, set_answer):
  set_answer(f'I look.\n{CALL}\n{CALL}')
  client.engine.pause = 0.001
  events, done = client.events(CHAT, talk(stream=True))
  client.engine.pause = 0.0
  assert done
  deltas = [event['choices'][0]['delta'] for event in events]
  assert ''.join(d.get('content') or '' for d in deltas) == 'I look.'
  # Nothing of a call's own writing is said to the user.
  assert not any('<tool' in (d.get('content') or '') for d in deltas)
  parts = [part for d in deltas for part in d.get('tool_calls', ())]
  for index in (0, 1):
    call_parts = [part for part in parts if part['index'] == index]
    assert (
      call_parts[0]['function']['name'] == 'weather' and call_parts[0]['id']
    )
    text = ''.join(part['function']['arguments'] for part in call_parts)
    assert json.loads(text) == {'town': 'Ulm'}
  assert events[-1]['choices'][0]['finish_reason'] == 'tool_calls'


@pytest.mark.parametrize(
  'choice',
  ['required', {'type': 'function', 'function': {'name': 'weather'}}],
)
def test_a_forced_call_fits_its_schema(client, choice):
  # The fake takes the greatest letter that is allowed, whatever it is.
  fields = dict(tool_choice=choice, parallel_tool_calls=False)
  status, answer = client.post(CHAT, talk(**fields))
  assert status == 200
  (call,) = answer['choices'][0]['message']['tool_calls']
  assert json.loads(call['function']['arguments'])['town'] in ('Ulm', 'Rom')
  events, _ = client.events(CHAT, talk(stream=True, **fields))
  assert events[-1]['choices'][0]['finish_reason'] == 'tool_calls'


def test_a_named_tool_is_called_exactly_once():
  named = {'type': 'function', 'function': {'name': 'weather'}}
  for choice, several in (('required', True), (named, False)):
    # Whether the answer may have more calls after the first.
    plan = ToolPlanner(object()).plan([TOOL], choice, True, '')
    assert plan.parallel is several


def test_calls_and_their_results_go_back_into_the_prompt(client, set_answer):
  set_answer('done')
  turns = [
    {'role': 'user', 'content': 'hi'},
    {
      'role': 'assistant',
      'content': None,
      'tool_calls': [
        {
          'id': 'call_1',
          'type': 'function',
          'function': {'name': 'weather', 'arguments': '{"town": "Ulm"}'},
        }
      ],
    },
    {'role': 'tool', 'tool_call_id': 'call_1', 'content': 'rain'},
  ]
  assert client.post(CHAT, talk(messages=turns))[0] == 200
  text = text_of(client.engine.requests[-1].prompt_ids)
  assert '<tool_call>{"name": "weather"' in text and 't:rain|' in text
  wrong = json.loads(json.dumps(turns).replace('{\\"town', '[\\"town'))
  status, answer = client.post(CHAT, talk(messages=wrong))
  assert status == 400 and 'messages[1]' in answer['error']['param']


@pytest.mark.parametrize(
  'fields',
  [
    {'tools': [{'type': 'function'}]},
    {'tools': [TOOL, TOOL]},
    {'tool_choice': 'always'},
    {'tool_choice': {'type': 'function', 'function': {'name': 'other'}}},
    {'tools': None, 'tool_choice': 'required'},
    {'response_format': {'type': 'json_object'}},
  ],
)
def test_wrong_tools_are_a_400(client, fields):
  status, answer = client.post(CHAT, talk(**fields))
  assert status == 400 and answer['error']['message']


@pytest.mark.parametrize(
  'form, texts',
  [
    ({'type': 'choice', 'choice': ['yes', 'no']}, ('yes', 'no')),
    ({'type': 'regex', 'regex': '[ab]{3}'}, ('bbb',)),
    ({'type': 'grammar', 'grammar': 'start: "x" "y"'}, ('xy',)),
    (
      {
        'type': 'json_schema',
        'json_schema': {
          'name': 'a',
          'strict': True,
          'schema': {
            'type': 'object',
            'properties': {'a': {'enum': [1, 2]}},
            'required': ['a'],
            'additionalProperties': False,
          },
        },
      },
      ('{"a": 1}', '{"a": 2}', '{"a":1}', '{"a":2}'),
    ),
  ],
)
def test_an_answer_is_kept_to_its_form(client, form, texts):
  status, answer = client.chat(response_format=form, n=2)
  assert status == 200
  for choice in answer['choices']:
    assert choice['message']['content'] in texts
    assert choice['finish_reason'] == 'stop'
  _, answer = client.complete(response_format=form, max_tokens=40)
  assert answer['choices'][0]['text'] in texts


def test_a_form_that_cannot_be_is_a_400(client):
  for form in (
    {'type': 'regex', 'regex': '('},
    {'type': 'grammar', 'grammar': 'start: nothing'},
    {
      'type': 'json_schema',
      'json_schema': {'name': 'a', 'schema': {'type': 'colour'}},
    },
  ):
    status, answer = client.chat(response_format=form)
    assert status == 400
    assert answer['error']['param'] == 'response_format'


def test_a_constraint_that_fails_midway_is_the_requests_fault(
  client, monkeypatch
):
  class Fails:
    def mask(self):
      raise ValueError('the constrained answer cannot go on; use a simpler one')

  monkeypatch.setattr(client.service.compiler, 'regex', lambda text: Fails())
  form = {'type': 'regex', 'regex': 'a'}
  status, answer = client.chat(response_format=form)
  assert status == 400 and 'cannot go on' in answer['error']['message']


def test_without_a_compiler_a_form_is_refused(client, monkeypatch):
  monkeypatch.setattr(client.service, 'compiler', None)
  status, answer = client.chat(response_format={'type': 'json_object'})
  assert status == 400 and 'llguidance' in answer['error']['message']
  assert client.chat(response_format={'type': 'text'})[0] == 200
