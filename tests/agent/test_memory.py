# SPDX-License-Identifier: Apache-2.0
"""Memory keeps to its tokens, and loses whole things."""

import itertools

import pytest

pytest.importorskip('openai')

from moepeft.agent.agent import Agent  # noqa: E402
from moepeft.agent.memory import Memory, TokenCounter  # noqa: E402
from moepeft.agent.tools import make_tool  # noqa: E402
from tests.agent.scripted import serving, text_reply, wants  # noqa: E402


def words(request) -> int:
  return len(str(request['messages']).split())


def call(n: int):
  function = {'name': 'f', 'arguments': '{}'}
  memory = {'id': f'c{n}', 'type': 'function', 'function': function}
  return (
    {'role': 'assistant', 'content': '', 'tool_calls': [memory]},
    {'role': 'tool', 'tool_call_id': f'c{n}', 'content': f'result {n} ' * 10},
  )


def is_whole(messages) -> bool:
  """Whether each call has its result right behind it, and the reverse."""
  for before, message in itertools.pairwise([{'role': ''}, *messages]):
    calls = message.get('tool_calls')
    if (message['role'] == 'tool') != bool(before.get('tool_calls')):
      return False
    if message['role'] == 'tool':
      if message['tool_call_id'] != before['tool_calls'][0]['id']:
        return False
    if calls and message is messages[-1]:
      return False
  return True


def filled() -> Memory:
  memory = Memory()
  for n in range(5):
    memory.add_question(f'question {n}')
    memory.messages += call(n)
    memory.messages.append({'role': 'assistant', 'content': f'answer {n}'})
  return memory


def test_the_oldest_question_goes_first_with_all_that_it_led_to():
  memory = filled()
  every = list(memory.messages)
  for n in range(1, 5):
    assert memory.forget() == every[4 * n - 4 : 4 * n]
    assert memory.messages == every[4 * n :]
  # Of the last one its text and its latest step stay.
  assert [m['role'] for m in memory.forget()] == ['assistant', 'tool']
  assert [m['content'] for m in memory.messages] == ['question 4', 'answer 4']
  assert memory.forget() == []


def test_steps_of_the_question_under_way_go_before_it_does():
  memory = Memory()
  memory.add_question('the question')
  for n in range(4):
    memory.messages += call(n)
  for n in range(3):
    assert memory.forget()[1]['tool_call_id'] == f'c{n}'
    assert memory.messages[0]['content'] == 'the question'
    assert is_whole(memory.messages)
  assert memory.forget() == []


@pytest.mark.parametrize('limit', range(75, 400, 41))
def test_the_limit_holds_for_all_that_is_sent(limit):
  # 44 words are the rule on tools.
  def page(n: int) -> str:
    """A page."""
    return f'word {n} ' * 7

  replies = [
    reply
    for n in range(7)
    for reply in (wants(('page', {'n': n})), text_reply(f'read {n}'))
  ]
  with serving(*replies, counts=True) as script:
    memory = Memory(limit, TokenCounter(script.client(), 'scripted'))
    agent_ = Agent(script.model(), [make_tool(page)], memory=memory)
    states = {agent_.ask(f'Read page {n}.').state for n in range(7)}
  assert states == {'answered'}
  for request in script.requests:
    texts = ' '.join(m['content'] or '' for m in request['messages'])
    assert len(texts.split()) <= limit
    assert is_whole(request['messages'][1:])


def test_the_servers_tokenize_counts_where_there_is_one():
  request = {
    'messages': [{'role': 'user', 'content': 'five words are in here'}]
  }
  with serving(text_reply('x'), counts=True) as script:
    count = TokenCounter(script.client(), 'scripted')
    assert count(request) == 5 and count.exact
  with serving(text_reply('x')) as script:
    count = TokenCounter(script.client(), 'scripted')
    # "{'role': 'user', 'content': 'five words are in here'}" has 53 bytes, 3 to
    # a token, rounded up, and 8 around it.
    assert count(request) == 26 and not count.exact


def test_an_agent_whose_question_does_not_fit_says_so():
  def page() -> str:
    """A page."""
    return 'word ' * 200

  with serving(wants(('page', {})), text_reply('ok'), counts=True) as script:
    memory = Memory(150, TokenCounter(script.client(), 'scripted'))
    outcome = Agent(script.model(), [make_tool(page)], memory=memory).ask(
      'Read.'
    )
  assert outcome.state == 'budget' and outcome.steps == 1
  assert 'memory holds 150' in outcome.why
