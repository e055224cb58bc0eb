# SPDX-License-Identifier: Apache-2.0
"""A server with OpenAI's API whose model says what a test wrote down.

So the openai client is used as it is, and what it is sent can be looked at.
"""

import contextlib
import functools
import http.server
import json
import threading
from collections.abc import Iterator, Sequence

import openai

from moepeft.agent.chat_model import ServerModel

KEY = 'sk-scripted-secret-key'
NAME = 'scripted'


def text_reply(text: str, reason: str = 'stop', tokens: int | None = 7) -> dict:
  """A reply of text."""
  return _reply({'role': 'assistant', 'content': text}, reason, tokens)


def wants(*calls: tuple[str, object], text: str = '', tokens: int = 7) -> dict:
  """A reply that calls tools: (name, arguments), text as it is, else JSON."""
  response = [
    {
      'id': f'call_{name}_{i}',
      'type': 'function',
      'function': {
        'name': name,
        'arguments': function
        if isinstance(function, str)
        else json.dumps(function),
      },
    }
    for i, (name, function) in enumerate(calls)
  ]
  message = {
    'role': 'assistant',
    'content': text or None,
    'tool_calls': response,
  }
  return _reply(message, 'tool_calls', tokens)


def refuses(status: int, message: str) -> dict:
  """An error in OpenAI's form."""
  return {'status': status, 'error': {'message': message, 'type': 'wrong'}}


def breaks(text: str) -> dict:
  """A reply whose connection breaks off in its middle."""
  return {**text_reply(text), 'breaks': True}


def _reply(message: dict, reason: str, tokens: int | None) -> dict:
  usage = tokens and {
    'prompt_tokens': tokens - 2,
    'completion_tokens': 2,
    'total_tokens': tokens,
  }
  choice = {'index': 0, 'message': message, 'finish_reason': reason}
  return {
    'id': 'x',
    'object': 'chat.completion',
    'created': 0,
    'model': NAME,
    'choices': [choice],
    'usage': usage,
  }


@functools.cache
def _client() -> openai.OpenAI:
  # Reading the system's certificates takes longer than a test.
  return openai.OpenAI(
    base_url='http://127.0.0.1:1/v1', api_key=KEY, max_retries=0, timeout=20
  )


class Script:
  """The replies that are left, and the requests so far.

  Attributes:
    requests: bodies of chat completions, in order.
    headers: theirs.
    counts: whether there is a /tokenize, which counts words of messages.
    pause: an event that a reply waits for, if there is one.
  """

  def __init__(self, replies: Sequence[dict], counts: bool = False):
    self.replies, self.requests, self.headers = list(replies), [], []
    self.counts, self.counted = counts, []
    self.pause: threading.Event | None = None
    self.url = ''

  def model(self, stream: bool = False) -> ServerModel:
    """Asked through the openai client."""
    return ServerModel(self.client(), NAME, stream)

  def client(self) -> openai.OpenAI:
    return _client().with_options(base_url=self.url)


@contextlib.contextmanager
def serving(*replies: dict, counts: bool = False) -> Iterator[Script]:
  """A script behind a server on loopback; the last reply is said again."""
  script = Script(replies, counts)
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _handler(script))
  server.daemon_threads = True
  thread = threading.Thread(
    target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True
  )
  thread.start()
  script.url = f'http://127.0.0.1:{server.server_address[1]}/v1'
  try:
    yield script
  finally:
    if script.pause:
      script.pause.set()
    server.shutdown()
    server.server_close()
    thread.join(5)


def _handler(script: Script) -> type[http.server.BaseHTTPRequestHandler]:
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      models = [{'id': NAME, 'object': 'model', 'created': 0, 'owned_by': 'us'}]
      self._json(200, {'object': 'list', 'data': models})

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      if self.path == '/tokenize':
        return self._count(body)
      script.requests.append(body)
      script.headers.append({k.lower(): v for k, v in self.headers.items()})
      reply = script.replies[0]
      if len(script.replies) > 1:
        script.replies.pop(0)
      if script.pause:
        script.pause.wait(20)
      if 'status' in reply:
        self._json(reply['status'], {'error': reply['error']})
      elif 'breaks' in reply:
        self._break(reply, body.get('stream'))
      elif body.get('stream'):
        self._stream(reply)
      else:
        self._json(200, reply)

    def _count(self, body):
      if not script.counts:
        return self._json(404, {'error': {'message': 'no such route'}})
      messages = ' '.join(str(m['content']) for m in body['messages'])
      script.counted.append(body)
      self._json(200, {'count': len(messages.split()), 'tokens': []})

    def _json(self, status, value):
      data = json.dumps(value).encode()
      self.send_response(status)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def _break(self, reply, stream):
      # Fewer bytes than announced, and the connection ends.
      self.send_response(200)
      kind = 'text/event-stream' if stream else 'application/json'
      self.send_header('Content-Type', kind)
      self.send_header('Content-Length', '10000')
      self.end_headers()
      text = json.dumps(next(_chunks(reply)))
      self.wfile.write(f'data: {text}\n\n'.encode() if stream else b'{"id')
      self.close_connection = True

    def _stream(self, reply):
      self.send_response(200)
      self.send_header('Content-Type', 'text/event-stream')
      self.end_headers()
      # A client may leave before the end.
      with contextlib.suppress(ConnectionError):
        for chunk in _chunks(reply):
          self.wfile.write(f'data: {json.dumps(chunk)}\n\n'.encode())
        self.wfile.write(b'data: [DONE]\n\n')

    def log_message(self, *args):
      pass

  return Handler


def _chunks(reply: dict) -> Iterator[dict]:
  """A reply in pieces of two letters, calls' arguments too."""
  choice = reply['choices'][0]
  message = choice['message']

  def chunk(delta, reason=None):
    function = {'index': 0, 'delta': delta, 'finish_reason': reason}
    return {
      **{k: v for k, v in reply.items() if k != 'usage'},
      'object': 'chat.completion.chunk',
      'choices': [function],
    }

  yield chunk({'role': 'assistant', 'content': ''})
  text = message['content'] or ''
  for i in range(0, len(text), 2):
    yield chunk({'content': text[i : i + 2]})
  for i, call in enumerate(message.get('tool_calls', ())):
    function = call['function']
    head = {**call, 'index': i, 'function': {**function, 'arguments': ''}}
    yield chunk({'tool_calls': [head]})
    for k in range(0, len(function['arguments']), 2):
      piece = {'arguments': function['arguments'][k : k + 2]}
      yield chunk({'tool_calls': [{'index': i, 'function': piece}]})
  yield chunk({}, choice['finish_reason'])
  if reply['usage']:
    yield {**chunk({}), 'choices': [], 'usage': reply['usage']}
