# SPDX-License-Identifier: Apache-2.0
"""Mutated inputs of the agent: each is an answer or a sentence, and in time.

`pytest -m slow -s` prints the figures.
"""

import collections
import copy
import json
import random
import signal

import pytest

pytest.importorskip('openai')

import openai  # noqa: E402

from moepeft.agent import (
  chat_markers,
  chat_model,  # noqa: E402
  config_file,
  skills,
  traces,
)
from moepeft.agent.agent import Agent  # noqa: E402
from moepeft.agent.loop import Budget  # noqa: E402
from moepeft.agent.tool_calls import ToolResult, quote_output  # noqa: E402
from moepeft.agent.tools import make_tool  # noqa: E402
from moepeft.core.terminal import visible  # noqa: E402

pytestmark = pytest.mark.slow
SEED, SECONDS = 20261128, 20
ODD = (
  None, True, False, 0, -1, 1.5, 10**30, -(10**18), float('nan'), '', 'x', '\0',
  '\ud800', '\x1b[2J', '../../x', '-c', [], {}, [None], {'': None},
  [[]] * 50, 'a' * 5000, {'role': 'tool'},
)  # fmt: skip
DEEP = '[' * 3000 + ']' * 3000


class Figures(collections.Counter):
  """Counts of inputs by what came of them."""

  def run(self, attempt, *allowed):
    """Runs one input: an `allowed` error is a refusal, of one line."""
    self['inputs'] += 1
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
      attempt()
    except allowed as e:
      self['refusals'] += 1
      assert str(e) and len(str(e).splitlines()) == 1, repr(e)
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)

  def show(self, name):
    print(f'{name}: {dict(self)}, tracebacks 0, hangs 0')


@pytest.fixture(autouse=True)
def hangs():
  def late(*_):
    # No ValueError or OSError, which would be refusals.
    raise AssertionError(f'an input took more than {SECONDS} s')

  before = signal.signal(signal.SIGALRM, late)
  yield
  signal.signal(signal.SIGALRM, before)


def mutated(draw: random.Random, value):
  """A copy of a JSON value with one to three nodes replaced or taken away."""
  value = copy.deepcopy(value)
  for _ in range(draw.randint(1, 3)):
    places = []
    stack = [value]
    while stack:
      node = stack.pop()
      pairs = ()
      if isinstance(node, dict):
        pairs = list(node.items())
      elif isinstance(node, list):
        pairs = list(enumerate(node))
      for key, child in pairs:
        places.append((node, key))
        stack.append(child)
    if not places:
      return copy.deepcopy(draw.choice(ODD))
    node, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.2:
      del node[key]
    elif kind < 0.3 and isinstance(node, list):
      node += [node[key]] * draw.choice((1, 3, 200))
    else:
      node[key] = copy.deepcopy(draw.choice(ODD))
  return value


def torn(draw: random.Random, data: bytes) -> bytes:
  """Bytes with a part changed, cut, doubled, or a deep value put in."""
  kind, at = draw.randrange(5), draw.randrange(len(data) + 1)
  if kind == 0:
    return data[:at]
  if kind == 1:
    return data[:at] + draw.randbytes(draw.randint(1, 8)) + data[at + 3 :]
  if kind == 2:
    return data[:at] + data[at // 2 :]
  if kind == 3:
    return data[:at] + DEEP.encode() + data[at:]
  return (
    data[:at] + draw.choice((b'\0', b'\xff', b'"', b'{', b'\n')) + data[at:]
  )


def add(a: int, b: list[str]) -> str:
  """Adds."""
  return f'{a} {b}'


ARGUMENTS = {'a': 3, 'b': ['x', 'y']}
REPLY = {
  'id': 'x',
  'choices': [
    {
      'index': 0,
      'message': {
        'role': 'assistant',
        'content': 'It is 5.',
        'tool_calls': [
          {
            'id': 'call_0',
            'type': 'function',
            'function': {'name': 'add', 'arguments': json.dumps(ARGUMENTS)},
          }
        ],
      },
      'finish_reason': 'tool_calls',
    }
  ],
  'usage': {'prompt_tokens': 5, 'completion_tokens': 2, 'total_tokens': 7},
}
CHUNKS = [
  {'choices': [{'index': 0, 'delta': {'role': 'assistant', 'content': 'It'}}]},
  {
    'choices': [
      {
        'delta': {
          'tool_calls': [
            {
              'index': 0,
              'id': 'c',
              'function': {'name': 'add', 'arguments': json.dumps(ARGUMENTS)},
            }
          ]
        }
      }
    ]
  },
  {'choices': [{'delta': {}, 'finish_reason': 'stop'}]},
  {'choices': [], 'usage': {'total_tokens': 7}},
]


def events(chunks) -> bytes:
  lines = [f'data: {json.dumps(chunk)}\n\n' for chunk in chunks]
  return ''.join([*lines, 'data: [DONE]\n\n']).encode()


def test_replies_of_a_model_server():
  draw, figures = random.Random(SEED), Figures()
  body, status = b'', 200

  def answer(request):
    return chat_model.httpx.Response(status, content=body)

  http = chat_model.httpx.Client(
    transport=chat_model.httpx.MockTransport(answer),
    event_hooks={'response': [chat_model._bound_stream]},
  )
  client = openai.OpenAI(
    base_url='http://x/v1', api_key='k', max_retries=0, http_client=http
  )

  def attempt(stream, form):
    served = chat_model.ServerModel(client, 'm', stream)
    made = Agent(
      served, [make_tool(add)], form=form, budget=Budget(steps=2, calls=3)
    )
    outcome = made.ask('?')
    figures[outcome.state] += 1
    assert '\n' not in outcome.why
    visible(outcome.text).encode()
    # What is kept can be sent and written down.
    json.dumps(made.memory.messages, ensure_ascii=False).encode()

  for i in range(1500):
    stream = bool(i % 2)
    made = mutated(draw, CHUNKS if stream else REPLY)
    if not isinstance(made, list) or not stream:
      data = json.dumps(made).encode()
    else:
      data = events(made)
    body = torn(draw, data) if draw.random() < 0.5 else data
    status = draw.choice((200, 200, 200, 200, 201, 400, 404, 500, 503))
    form = 'react' if i % 5 == 0 else 'native'
    figures.run(lambda stream=stream, form=form: attempt(stream, form))
    if i % 10 == 0:
      figures.run(lambda: chat_model.list_models(client), chat_model.ReplyError)
  figures.show('replies')
  assert figures['failed'] > 500 and figures['inputs'] == 1650


def test_arguments_of_tools():
  draw, figures = random.Random(SEED + 1), Figures()
  made = make_tool(add)
  for _ in range(4000):
    value = mutated(draw, ARGUMENTS)
    data = json.dumps(value).encode()
    if draw.random() < 0.5:
      data = torn(draw, data)
    text = data.decode(errors='surrogateescape')
    figures.run(lambda text=text: made.run(text), ValueError)
  figures.show('arguments')
  assert figures['refusals'] > 1000


def test_outputs_of_tools():
  draw, figures = random.Random(SEED + 2), Figures()
  pieces = (
    '</ tool_output > < <| |> [ ] INST [/ << SYS >> \n \x1b \u200b ＜ ‹ s x'
  )
  pieces = [*pieces.split(' '), ' ', '\u202e', '\ud800', '\0']

  def attempt(text):
    data = quote_output(ToolResult('i', 'n', '{}', text))
    inside = data.removeprefix('<tool_output>').removesuffix('</tool_output>')
    folded = chat_markers._normalize(inside).lower()
    for mark in ('<tool_output', '</', '<|', '[inst]', '<s>', '[/inst]'):
      assert mark not in folded, (text, inside)
    visible(data).encode()

  for _ in range(4000):
    text = ''.join(draw.choices(pieces, k=draw.randint(1, 40)))
    figures.run(lambda text=text: attempt(text))
  figures.show('outputs')


def test_skills(tmp_path):
  draw, figures = random.Random(SEED + 3), Figures()
  good = (
    b'---\nname: dig\ndescription: Digs holes. Use for holes.\nlicense: MIT\n'
    b'metadata:\n  author: me\n  tags: [a, b]\n---\n# Dig\n\nUse a spade.\n'
  )
  own = tmp_path / 'dig'
  own.mkdir()
  for _ in range(600):
    data = good
    for _ in range(draw.randint(1, 3)):
      data = torn(draw, data.replace(DEEP.encode(), b'&a [*a]'))
    (own / 'SKILL.md').write_bytes(data)
    figures.run(lambda: skills.find_skills([tmp_path]), ValueError, OSError)
  figures.show('skills')
  assert figures['refusals'] > 100


def test_traces(tmp_path):
  draw, figures = random.Random(SEED + 4), Figures()
  path = tmp_path / 'trace.jsonl'
  replies = [chat_model._parse_reply(REPLY, {'messages': []}), None]
  replies[1] = chat_model.ChatReply({'role': 'assistant', 'content': 'done'})
  trace = traces.TraceWriter(str(path))
  made = Agent(
    lambda request, piece, seconds: replies[len(request['messages']) > 2],
    [make_tool(add)],
    'Be.',
    on_event=trace,
  )
  assert made.ask('?').state == 'answered'
  trace.close()
  assert traces.replay_trace(str(path))
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for _ in range(4000):
    value = mutated(draw, rows)
    value = value if isinstance(value, list) else [value]
    data = ''.join(f'{json.dumps(row)}\n' for row in value).encode()
    if draw.random() < 0.3:
      data = torn(draw, data)
    path.write_bytes(data)
    figures.run(lambda: traces.replay_trace(str(path)), ValueError, OSError)
  figures.show('traces')
  assert figures['refusals'] > 1000


def test_config_files(tmp_path):
  draw, figures = random.Random(SEED + 5), Figures()
  good = (
    b'mine.py\n'
    + config_file.render_config('A.', {'a.b': 1, 'c': 'x'}).encode()
  )
  for _ in range(3000):
    data = torn(draw, good)
    figures.run(
      lambda data=data: config_file.save_config(data, tmp_path), ValueError
    )
  figures.show('config files')
  # What was written is a config file, whatever was handed over.
  for path in tmp_path.iterdir():
    assert path.suffix == '.py'
    config_file.parse_config(path.read_text())
