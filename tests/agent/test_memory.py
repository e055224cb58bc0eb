# SPDX-License-Identifier: Apache-2.0
"""Memory keeps to its tokens, and loses whole things."""

import itertools

import pytest

pytest.importorskip('openai')

from moepeft.agent.agent import Agent  # noqa: E402
from moepeft.agent.memory import AROUND, Full, Memory, Tokens  # noqa: E402
from moepeft.agent.model import estimate  # noqa: E402
from moepeft.agent.tools import tool  # noqa: E402
from tests.agent.scripted import says, serving, wants  # noqa: E402


def words(text: str) -> int:
  return len(text.split())


def call(n: int):
  function = {'name': 'f', 'arguments': '{}'}
  made = {'id': f'c{n}', 'type': 'function', 'function': function}
  return (
    {'role': 'assistant', 'content': '', 'tool_calls': [made]},
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


def filled(limit, summarise=None) -> Memory:
  memory = Memory(limit, words, summarise)
  for n in range(5):
    memory.question(f'question {n}')
    memory.step(call(n))
    memory.step([{'role': 'assistant', 'content': f'answer {n}'}])
  return memory


@pytest.mark.parametrize('limit', range(40, 400, 17))
def test_the_limit_holds_and_pairs_are_never_split(limit):
  memory = filled(limit)
  messages = memory.messages('the system prompt')
  used = sum(
    words(f'{m["content"]} {m.get("tool_calls", "")}') + AROUND
    for m in messages
  )
  # `words` sees a call's JSON a little differently here: a word or two each.
  assert used <= limit + 3 * len(messages)
  assert messages[0] == {'role': 'system', 'content': 'the system prompt'}
  assert is_whole(messages)
  assert messages[-1]['content'] == 'answer 4'
  assert messages[1]['role'] == 'user'


def test_the_oldest_question_goes_first_with_all_that_it_led_to():
  # A question: 2 words, its call 2 ("tool_calls" in JSON: 8 words), 20 and 2.
  memory = filled(10_000)
  every = memory.messages('')
  assert len(every) == 20
  one = sum(memory._of(m, lambda event: None) for m in every[:4])
  memory.limit = 5 * one - 1
  assert memory.messages('') == every[4:]
  memory.limit = 3 * one
  assert memory.messages('') == every[8:]


def test_steps_of_the_question_under_way_go_before_it_does():
  memory = Memory(75, words)
  memory.question('the question')
  for n in range(4):
    memory.step(call(n))
  messages = memory.messages('')
  assert messages[0]['content'] == 'the question'
  assert is_whole(messages)
  assert messages[-1]['tool_call_id'] == 'c3'
  assert len(messages) < 9


def test_what_cannot_be_forgotten_is_refused():
  memory = Memory(20, words)
  memory.question('word ' * 30)
  with pytest.raises(Full, match='have 38 tokens, memory holds 20'):
    memory.messages('')


def test_lost_messages_become_a_summary_in_the_users_role():
  lost = []

  def summarise(messages):
    lost.append([m['content'] for m in messages])
    return f'summary {len(lost)}'

  memory = filled(120, summarise)
  messages = memory.messages('system')
  assert lost[0][0] == 'question 0' and lost[0][-1] == 'answer 0'
  # What was summarised before is part of what is summarised next.
  assert lost[1][0] == 'summary 1'
  assert messages[0]['content'] == 'system'
  assert messages[1]['role'] == 'user'
  last = f'summary {len(lost)}'
  assert messages[1]['content'].startswith(f'<summary>\n{last}\n</summary>\n\n')


def test_the_servers_tokenize_counts_where_there_is_one():
  with serving(says('x'), counts=True) as script:
    count = Tokens(script.client(), 'scripted')
    assert count.exact is None
    assert count('five words are in here') == 5
    assert count.exact is True
  with serving(says('x')) as script:
    count = Tokens(script.client(), 'scripted')
    # 22 bytes of UTF-8, 3 to a token, rounded up.
    assert count('five words are in here') == 8 == estimate('x' * 22)
    assert count.exact is False


def test_an_agent_whose_question_does_not_fit_says_so():
  def page() -> str:
    """A page."""
    return 'word ' * 200

  with serving(wants(('page', {})), says('ok'), counts=True) as script:
    memory = Memory(150, Tokens(script.client(), 'scripted'))
    outcome = Agent(script.model(), [tool(page)], memory=memory).ask('Read.')
  assert outcome.state == 'budget' and outcome.steps == 1
  assert 'memory holds 150' in outcome.why
