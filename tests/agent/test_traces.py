# SPDX-License-Identifier: Apache-2.0
"""Traces hold all but secrets, and replay to the same outcome."""

import itertools
import json

import pytest

pytest.importorskip('openai')

from moepeft.agent import traces  # noqa: E402
from moepeft.agent.agent import Agent  # noqa: E402
from moepeft.agent.loop import Budget  # noqa: E402
from moepeft.agent.memory import Memory, TokenCounter  # noqa: E402
from moepeft.agent.tools import make_tool  # noqa: E402
from tests.agent.scripted import (  # noqa: E402
  KEY,
  refuses,
  serving,
  text_reply,
  wants,
)

ROLLS = itertools.count()


def roll(sides: int) -> str:
  """Rolls a die; never the same twice."""
  return f'{next(ROLLS)} of {sides}'


def leak() -> str:
  """Says what it should not."""
  return f'OPENAI_API_KEY={KEY}'


def traced(path, replies, questions, **parts):
  """The outcomes of questions, with a trace at `path`."""
  with serving(*replies, counts=True) as script:
    trace = traces.TraceWriter(path, [KEY])
    if 'memory' in parts:
      count = TokenCounter(script.client(), 'scripted')
      parts['memory'] = Memory(parts['memory'], count)
    agent_ = Agent(
      script.model(),
      [make_tool(roll), make_tool(leak)],
      'Be.',
      on_event=trace,
      **parts,
    )
    outcomes = [agent_.ask(question) for question in questions]
    trace.close()
  return outcomes


CASES = {
  'answered': ([wants(('roll', {'sides': 6})), text_reply('0')], {}),
  'several calls': (
    [wants(('roll', {'sides': 6}), ('roll', {'sides': 8})), text_reply('0')],
    {},
  ),
  'loop': ([wants(('leak', {}))], {}),
  'steps': ([wants(('roll', {'sides': 6}))], {'budget': Budget(steps=4)}),
  'failed': ([wants(('roll', {'sides': 6})), refuses(500, 'oh')], {}),
  'plan': (
    [
      text_reply('plan'),
      wants(('roll', {'sides': 2})),
      text_reply('1'),
      text_reply('OK'),
    ],
    {'mode': 'plan'},
  ),
  'react': (
    [text_reply('Action: roll\nAction Input: {"sides": 3}'), text_reply('hm')],
    {'form': 'react'},
  ),
  'seconds': (
    [wants(('roll', {'sides': 6}))],
    {
      'budget': Budget(seconds=100.0, steps=99),
      'clock': itertools.count(0.0, 30.0).__next__,
    },
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_a_trace_replays_to_its_outcome_without_a_server(name, tmp_path):
  replies, parts = CASES[name]
  path = str(tmp_path / 'trace.jsonl')
  outcomes = traced(path, replies, ['What?'], **parts)
  events = []
  assert traces.replay_trace(path, events.append) == outcomes
  assert events[-1]['event'] == 'ended'


def test_a_conversation_with_a_short_memory_replays(tmp_path):
  path = str(tmp_path / 'trace.jsonl')
  replies = [wants(('roll', {'sides': 6})), text_reply('one two three')] * 4
  outcomes = traced(
    path,
    replies,
    [f'question {i} of some words' for i in range(4)],
    # The rule on tools has 44 words, an answered question 13.
    memory=70,
  )
  kinds = [row['event'] for row in traces.read_trace(path)]
  assert kinds.count('forgotten') > 1
  assert traces.replay_trace(path) == outcomes
  assert {outcome.state for outcome in outcomes} == {'answered'}


def test_a_trace_holds_requests_replies_calls_seeds_and_times(tmp_path):
  path = str(tmp_path / 'trace.jsonl')
  replies = [wants(('roll', {'sides': 6})), text_reply('0')]
  traced(path, replies, ['What?'], options={'seed': 3})
  rows = traces.read_trace(path)
  assert [row['event'] for row in rows] == [
    'started',
    'asked',
    'replied',
    'called',
    'returned',
    'asked',
    'replied',
    'ended',
  ]
  assert all(row['at'].endswith('+00:00') for row in rows)
  question = [row for row in rows if row['event'] == 'asked']
  assert all(row['request']['seed'] == 3 for row in question)
  assert question[1]['request']['messages'][-1]['role'] == 'tool'
  assert (
    rows[2]['message']['tool_calls'][0]['function']['arguments']
    == '{"sides": 6}'
  )
  assert ' of 6' in rows[4]['text']


def test_a_key_is_never_written(tmp_path):
  path = tmp_path / 'trace.jsonl'
  replies = [wants(('leak', {})), refuses(401, f'wrong key {KEY}')]
  (outcome,) = traced(str(path), replies, ['What?'])
  text = path.read_text()
  assert KEY not in text
  assert text.count('[hidden]') >= 2
  assert outcome.state == 'failed'


def test_a_changed_or_broken_trace_is_told_where(tmp_path):
  path = tmp_path / 'trace.jsonl'
  replies = [wants(('roll', {'sides': 6})), text_reply('0')]
  traced(str(path), replies, ['What?'])
  text = path.read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  # What the model was told of the tool is not what the tool returned.
  rows[5]['request']['messages'][3]['content'] = 'another'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  with pytest.raises(ValueError, match=r"\[3\]\['content'\] was .another"):
    traces.replay_trace(str(path))
  path.write_text('{"no": "event"}\n')
  with pytest.raises(ValueError, match='line 1 of .* is no event'):
    traces.replay_trace(str(path))
  # A kill tears the last line: that question did not end.
  path.write_text(text[:-10])
  assert traces.replay_trace(str(path)) == []
