# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.agent --serve: questions over HTTP, with events."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip('openai')
uvicorn = pytest.importorskip('uvicorn')

from moepeft.agent import http_server  # noqa: E402
from moepeft.agent.agent import Agent  # noqa: E402
from moepeft.agent.loop import Budget  # noqa: E402
from moepeft.agent.tools import make_tool  # noqa: E402
from moepeft.core import http_access  # noqa: E402
from moepeft.core.http_access import ApiKeys  # noqa: E402
from tests import ROOT, commands  # noqa: E402
from tests.agent.scripted import refuses, serving, text_reply, wants  # noqa: E402


def weather(town: str) -> str:
  """The weather of a town.

  Args:
    town: its name.
  """
  return f'warm in {town}'


class Client:
  """Asks a served agent."""

  def __init__(self, port, key=''):
    self.port, self.key = port, key

  def send(self, method, path, body=None, **headers):
    """(status, bytes)."""
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=20)
    headers = {k.replace('_', '-'): v for k, v in headers.items()}
    if body is not None and not isinstance(body, bytes):
      body = json.dumps(body).encode()
    headers.setdefault('Content-Type', 'application/json')
    if self.key:
      headers['Authorization'] = f'Bearer {self.key}'
    try:
      connection.request(method, path, body, headers)
      response = connection.getresponse()
      return response.status, response.read()
    finally:
      connection.close()

  def ask(self, question='?', **fields):
    """[(name of an event, its data)]."""
    status, raw = self.send('POST', '/ask', {'question': question, **fields})
    assert status == 200, raw
    events = []
    for block in raw.decode().split('\n\n')[:-1]:
      name, data = block.split('\n')
      data = json.loads(data.removeprefix('data: '))
      events.append((name.removeprefix('event: '), data))
    return events


@contextlib.contextmanager
def served(script, keys=None, **fields):
  """A client of an agent whose model follows a script."""
  tools = [make_tool(weather)]
  agent = Agent(script.model(stream=True), tools, **fields)
  keys = keys or ApiKeys()
  hosts = http_access.accepted_hosts('127.0.0.1', keys)
  app = http_server.AgentServer(agent).app(keys, hosts)
  listener = socket.create_server(('127.0.0.1', 0))
  server = uvicorn.Server(uvicorn.Config(app, lifespan='off', log_config=None))
  thread = threading.Thread(
    target=server.run, kwargs={'sockets': [listener]}, daemon=True
  )
  thread.start()
  while not server.started:
    time.sleep(0.01)
  try:
    yield Client(listener.getsockname()[1])
  finally:
    server.should_exit = True
    thread.join(10)


def test_a_question_is_a_stream_of_events():
  replies = wants(('weather', {'town': 'Ulm'})), text_reply('It is warm.')
  with serving(*replies) as script, served(script) as client:
    events = client.ask('Is it warm in Ulm?')
  names = [name for name, _ in events]
  assert names[:4] == ['session', 'step', 'tool_call', 'tool_result']
  assert names[4] == 'step' and set(names[5:-2]) == {'text_delta'}
  assert names[-2:] == ['answer', 'done']
  data = dict(events)
  assert data['tool_call']['name'] == 'weather'
  assert json.loads(data['tool_call']['arguments']) == {'town': 'Ulm'}
  assert data['tool_result']['text'] == 'warm in Ulm'
  assert data['tool_result']['failed'] is False
  assert [d['number'] for name, d in events if name == 'step'] == [1, 2]
  text = ''.join(d['text'] for name, d in events if name == 'text_delta')
  assert text == data['answer']['text'] == 'It is warm.'
  assert data['answer']['state'] == 'answered' and data['answer']['calls'] == 1


def test_a_session_is_a_conversation_of_its_own():
  with serving(text_reply('Yes.')) as script, served(script) as client:
    first = dict(client.ask('One?'))['session']['id']
    client.ask('Two?', session=first)
    assert [m['content'] for m in script.requests[-1]['messages'][1:]] == [
      'One?',
      'Yes.',
      'Two?',
    ]
    client.ask('Three?')
    assert len(script.requests[-1]['messages']) == 2
    assert client.send('DELETE', f'/sessions/{first}')[0] == 200
    body = {'question': '?', 'session': first}
    status, raw = client.send('POST', '/ask', body)
    assert status == 404 and b'no such session' in raw


def test_a_failure_is_an_error_event():
  with serving(refuses(400, 'no')) as script, served(script) as client:
    events = client.ask()
  assert [name for name, _ in events] == ['session', 'step', 'error', 'done']
  assert 'HTTP 400' in dict(events)['error']['message']
  with serving(wants(('weather', {'town': 'a'}))) as script:
    with served(script, budget=Budget(steps=2)) as client:
      error = dict(client.ask())['error']
  assert error['state'] == 'budget' and 'budget of 2 steps' in error['message']


def test_a_client_that_leaves_ends_its_question():
  with serving(text_reply('a' * 40)) as script, served(script) as client:
    script.pause = threading.Event()
    connection = http.client.HTTPConnection('127.0.0.1', client.port)
    body = json.dumps({'question': '?'})
    kind = {'Content-Type': 'application/json'}
    connection.request('POST', '/ask', body, kind)
    response = connection.getresponse()
    response.readline()
    session = json.loads(response.readline().removeprefix(b'data: '))['id']
    again = {'question': 'again', 'session': session}
    status, raw = client.send('POST', '/ask', again)
    assert status == 409 and b'answers a question' in raw
    response.close()
    connection.close()
    time.sleep(0.3)
    script.pause.set()
    until = time.monotonic() + 10
    while client.send('POST', '/ask', again)[0] != 200:
      assert time.monotonic() < until
      time.sleep(0.05)
  # The conversation is as before the question that was left.
  contents = [m['content'] for m in script.requests[-1]['messages'][1:]]
  assert contents == ['again']


def test_only_so_many_questions_run_at_once():
  with serving(text_reply('a')) as script, served(script) as client:
    script.pause = threading.Event()
    threads = [threading.Thread(target=client.ask) for _ in range(4)]
    for thread in threads:
      thread.start()
    until = time.monotonic() + 10
    while len(script.requests) < 4:
      assert time.monotonic() < until
      time.sleep(0.01)
    status, raw = client.send('POST', '/ask', {'question': '?'})
    script.pause.set()
    for thread in threads:
      thread.join(10)
  assert status == 429 and b'4 questions' in raw


@pytest.mark.parametrize(
  'body, headers, status, message',
  [
    (b'{', {}, 400, 'not JSON'),
    (b'{}', {}, 400, 'question: Field required'),
    ({'question': ''}, {}, 400, 'at least 1 character'),
    ({'question': 'a', 'x': 1}, {}, 400, 'x: Extra inputs'),
    ({'question': 5}, {}, 400, 'question'),
    (b'[' * 5000, {}, 400, 'the body'),
    (b'"' + b'a' * (2 << 20), {}, 413, 'longer than'),
    ({'question': 'a'}, {'Content_Type': 'text/plain'}, 400, 'send JSON'),
    ({'question': 'a'}, {'Host': 'evil.example'}, 403, 'evil.example'),
  ],
)
def test_what_is_no_question_is_one_sentence(body, headers, status, message):
  with serving(text_reply('a')) as script, served(script) as client:
    actual, raw = client.send('POST', '/ask', body, **headers)
    assert actual == status
    error = json.loads(raw)['error']
    assert message in error['message'] and '\n' not in error['message']
    assert not script.requests


def test_a_key_is_needed_where_there_are_keys():
  with serving(text_reply('a')) as script:
    with served(script, ApiKeys((b'secret',))) as client:
      assert client.send('GET', '/health')[0] == 200
      assert client.send('POST', '/ask', {'question': '?'})[0] == 401
      client.key = 'secret'
      assert dict(client.ask())['answer']['text'] == 'a'


def test_the_command_serves_and_ends_at_a_signal():
  with serving(text_reply('It is 360.')) as script:
    flags = (f'--base_url={script.url}', '--serve', '--port=0', '--skills=')
    process = subprocess.Popen(
      [sys.executable, '-m', 'moepeft.agent', *flags],
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    try:
      line = process.stdout.readline()
      assert line.startswith('serving at http://127.0.0.1:'), line
      client = Client(int(line.rpartition(':')[2]))
      assert dict(client.ask('12 * 30?'))['answer']['text'] == 'It is 360.'
      process.terminate()
      process.wait(30)
    finally:
      process.kill()
      process.wait(10)
      process.stdout.close()


@pytest.mark.parametrize(
  'flags, message',
  [
    (('--serve', '--host=0.0.0.0'), 'name a file of keys'),
    (('--serve', 'Why?'), 'omit question'),
    (('--serve', '--trace=x'), 'omit trace'),
    (('--serve', '--port=70000'), 'an integer from 0 to 65,535'),
  ],
)
def test_flags_that_do_not_go_with_it_are_refused(flags, message):
  with serving(text_reply('a')) as script:
    done = commands.run('moepeft.agent', f'--base_url={script.url}', *flags)
  assert done.returncode == 2
  assert message in done.stderr and 'Traceback' not in done.stderr
