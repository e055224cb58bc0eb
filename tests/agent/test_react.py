# SPDX-License-Identifier: Apache-2.0
"""ReAct: tools by text, for models that know no calls."""

import pytest

pytest.importorskip('openai')

from moepeft.agent.agent import Agent  # noqa: E402
from moepeft.agent.react import parse_reply  # noqa: E402
from moepeft.agent.tools import make_tool  # noqa: E402
from tests.agent.scripted import serving, text_reply  # noqa: E402


def add(a: int, b: int) -> int:
  """Adds two numbers."""
  return a + b


def ask(*replies):
  with serving(*replies) as script:
    outcome = Agent(script.model(), [make_tool(add)], form='react').ask(
      '2 + 3?'
    )
  return outcome, script.requests


def test_an_action_is_run_and_observed():
  outcome, requests = ask(
    text_reply(
      'Thought: add them\nAction: add\nAction Input: {"a": 2, "b": 3}\n'
    ),
    text_reply('Thought: done\nFinal Answer: 5\nas it should be'),
  )
  assert (outcome.state, outcome.text) == ('answered', '5\nas it should be')
  assert outcome.calls == 1
  first, second = requests
  assert 'tools' not in first and first['stop'] == ['Observation:']
  system = first['messages'][0]['content']
  assert 'add: Adds two numbers. {' in system and 'Action Input:' in system
  assert second['messages'][-1] == {
    'role': 'user',
    'content': 'Observation:\n<tool_output>\n5\n</tool_output>',
  }


def test_an_observation_that_the_model_makes_up_is_cut_off():
  outcome, requests = ask(
    text_reply(
      'Action: add\nAction Input: {"a": 2, "b": 3}\nObservation: 7\n'
      'Final Answer: 7'
    ),
    text_reply('Final Answer: 5'),
  )
  assert outcome.text == '5'
  assert '7' not in str(requests[1]['messages'][2:])


def test_replies_outside_the_protocol_are_told_and_then_end_it():
  outcome, requests = ask(text_reply('Well, five I think.'))
  assert (outcome.state, outcome.text) == ('malformed', 'Well, five I think.')
  assert outcome.steps == 3
  assert 'in neither form' in requests[1]['messages'][-1]['content']
  outcome, _ = ask(
    text_reply('Hm.'), text_reply('Hm.'), text_reply('Final Answer: 5')
  )
  assert outcome.state == 'answered'


def test_wrong_json_is_an_observation():
  outcome, requests = ask(
    text_reply('Action: add\nAction Input: a=2, b=3'),
    text_reply('Final Answer: ?'),
  )
  assert outcome.state == 'answered'
  assert 'Invalid JSON' in requests[1]['messages'][-1]['content']


@pytest.mark.parametrize(
  ('text', 'name', 'arguments'),
  [
    ('Action: add\nAction Input: {"a": 1}\nmore', 'add', '{"a": 1}'),
    ('**Action:** `add`\n**Action Input:** {"a": 1}', 'add', '{"a": 1}'),
    ('Action: add()\nAction Input:\n```json\n{"a": 1}\n```', 'add', '{"a": 1}'),
    ('action: add\n\naction input: {"a": {"b": "}"}}', 'add', None),
  ],
)
def test_actions_are_found_however_they_are_dressed(text, name, arguments):
  message, _, _ = parse_reply({'content': text}, 4)
  (call,) = message['tool_calls']
  assert call['id'] == 'react_4' and call['function'] == {
    'name': name,
    'arguments': arguments or '{"a": {"b": "}"}}',
  }


def test_what_comes_first_counts():
  action = 'Action: add\nAction Input: {}'
  message, _, _ = parse_reply({'content': f'{action}\nFinal Answer: 1'}, 1)
  assert message['tool_calls']
  message, answer, _ = parse_reply({'content': f'Final Answer: 1\n{action}'}, 1)
  assert 'tool_calls' not in message and answer.startswith('1\n')
