# SPDX-License-Identifier: Apache-2.0
"""A server that says what a test tells it to, byte by byte."""

import base64
import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

# Longer than any of it takes; a test that waits so long has failed.
PATIENCE = 20.0
DONE = b'data: [DONE]\n\n'

Reply = Callable[['Handler'], None]


class Pretended(ThreadingHTTPServer):
  """The server of a test, on a port of its own.

  Attributes:
    replies: a reply to each coming request for an answer, in order.
    ready, models: the replies to `/ready` and `/v1/models`.
    requests: the bodies of the requests for answers so far.
    keys: the `Authorization` of every request for models or an answer.
    left: set once a client went away in the middle of an answer.
  """

  daemon_threads = True

  def __init__(self, page: bytes, headers: dict[str, str]):
    super().__init__(('127.0.0.1', 0), Handler)
    self.page, self.page_headers = page, headers
    self.replies: deque[Reply] = deque()
    self.ready: Reply = json_of({'status': 'ready'})
    self.models: Reply = models('base', 'routed')
    self.requests: list[dict] = []
    self.keys: list[str | None] = []
    self.left = threading.Event()

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.server_port}/'

  def handle_error(self, request, client_address):
    """Broken connections are what tests are about."""


class Handler(BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  server: Pretended

  def do_GET(self):
    if self.path == '/':
      self.send(200, self.server.page, self.server.page_headers)
    elif self.path == '/ready':
      self.server.ready(self)
    elif self.path == '/v1/models':
      self.server.keys.append(self.headers['Authorization'])
      self.server.models(self)
    else:
      error(404, 'nothing here')(self)

  def do_POST(self):
    body = self.rfile.read(int(self.headers['Content-Length']))
    if self.path != '/v1/chat/completions':
      return error(404, 'nothing here')(self)
    self.server.requests.append(json.loads(body))
    self.server.keys.append(self.headers['Authorization'])
    self.server.replies.popleft()(self)

  def send(self, status: int, body: bytes, headers: dict[str, str]):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def open_stream(self):
    self.send_response(200)
    self.send_header('Content-Type', 'text/event-stream')
    self.send_header('Transfer-Encoding', 'chunked')
    self.end_headers()

  def write(self, part: bytes):
    self.wfile.write(b'%x\r\n%s\r\n' % (len(part), part))
    self.wfile.flush()

  def log_message(self, format, *args):
    """Nothing: pytest shows what matters."""


def json_of(body: dict, status: int = 200, **headers: str) -> Reply:
  head = {'Content-Type': 'application/json'} | {
    name.replace('_', '-'): value for name, value in headers.items()
  }
  return lambda handler: handler.send(status, json.dumps(body).encode(), head)


def models(*names: str, routing: bool = False) -> Reply:
  """Models; those with experts are 'routed', or all of them (`routing`)."""
  data = [
    {'id': name, 'object': 'model', 'routing': routing or name == 'routed'}
    for name in names
  ]
  return json_of({'object': 'list', 'data': data})


def error(status: int, message: str, **headers: str) -> Reply:
  return json_of({'error': {'message': message}}, status, **headers)


def in_turn(*replies: Reply) -> Reply:
  """The first, then the next, and the last from then on."""
  waiting = deque(replies)

  def reply(handler):
    (waiting.popleft() if len(waiting) > 1 else waiting[0])(handler)

  return reply


def event(text: str = '', reason: str | None = None, **choice) -> bytes:
  """A chunk of a chat's stream; `choice` is what its choice has beside."""
  choice_ = {'index': 0, 'delta': {'content': text}, 'finish_reason': reason}
  return sse({'choices': [choice_ | choice]})


def sse(body: dict) -> bytes:
  return f'data: {json.dumps(body, ensure_ascii=False)}\n\n'.encode()


def usage(prompt: int, answer: int) -> bytes:
  counts = {'prompt_tokens': prompt, 'completion_tokens': answer}
  return sse({'choices': [], 'usage': counts})


def routed(tokens: Iterable[tuple[str, dict | None]], **fields) -> bytes:
  """A chunk of tokens, each with the weights of its experts by site.

  Weights of a site are [e], or [l, e] with None for experts that a layer lacks.
  """
  tokens = list(tokens)
  routing = [{'token': t} | weights_of(experts) for t, experts in tokens]
  scored = [{'token': t, 'logprob': -0.5, 'bytes': None} for t, _ in tokens]
  text = fields.pop('text', ''.join(t for t, _ in tokens))
  more = {'routing': routing, 'logprobs': {'content': scored}}
  return event(text, **more, **fields)


def weights_of(experts: dict | None) -> dict:
  if experts is None:
    return {'experts': None, 'layers': None}
  stacks = {
    site: np.atleast_2d(np.array(weights, float))
    for site, weights in experts.items()
  }
  return {
    'experts': {
      site: np.nan_to_num(stack).mean(0).tolist()
      for site, stack in stacks.items()
    },
    'layers': {
      site: base64.b64encode(stack.astype('<f2').tobytes()).decode()
      for site, stack in stacks.items()
    },
  }


def stream(*steps: bytes | threading.Event) -> Reply:
  """Writes bytes as they are, and waits for an event where one stands."""

  def reply(handler):
    handler.open_stream()
    for step in steps:
      if isinstance(step, bytes):
        handler.write(step)
      elif not step.wait(PATIENCE):
        return
    handler.write(b'')

  return reply


def text_reply(*texts: str) -> Reply:
  """A whole answer."""
  return stream(*map(event, texts), event('', 'stop'), DONE)


def endless(text: str) -> Reply:
  """Some text, and then comments until the client leaves."""

  def reply(handler):
    handler.open_stream()
    handler.write(event(text))
    handler.connection.settimeout(PATIENCE)
    # A client that goes on listening sends nothing; one that leaves, an end.
    try:
      disconnected = not handler.connection.recv(1)
    except (TimeoutError, OSError) as e:
      disconnected = isinstance(e, ConnectionError)
    if disconnected:
      handler.server.left.set()
    handler.close_connection = True

  return reply


def cut(text: str, event_: threading.Event) -> Reply:
  """Some text, and a connection that breaks once it has been seen."""

  def reply(handler):
    handler.open_stream()
    handler.write(event(text))
    event_.wait(PATIENCE)
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)

  return reply
