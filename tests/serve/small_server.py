# SPDX-License-Identifier: Apache-2.0
"""A server on a loopback port in a thread, with a fake engine behind it."""

import contextlib
import http.client
import json
import socket
import threading
import time

import numpy as np
import pytest

from moepeft.core.http_access import listen
from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
)
from moepeft.inference.token_bytes import byte_alphabet
from moepeft.serve.http.chat_templates import ChatSettings
from moepeft.serve.http.connection import DEFAULT_LIMITS
from moepeft.serve.http.metrics import Metrics
from moepeft.serve.http.model_registry import ModelRegistry
from moepeft.serve.http.server import Server, serve
from moepeft.serve.http.service import Service
from moepeft.serve.http.text import ServedTokenizer
from tests.serve.fake_engine import END, FakeEngine

# Turns as 'u:text|', of an assistant 'a:', then 'a:' for the answer.
TEMPLATE = (
  '{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}'
  '{% if add_generation_prompt %}a:{% endif %}'
)
TIMEOUT = 20


def byte_tokenizer(path):
  """A tokenizer of Hugging Face whose ids are those of bytes, with TEMPLATE."""
  from tokenizers import Tokenizer as Backend
  from tokenizers import decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  vocab = {'<pad>': 0, '<eos>': END, '<unk>': 2}
  vocab |= {letter: byte + 3 for letter, byte in byte_alphabet().items()}
  backend = Backend(models.BPE(vocab, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token='<pad>',
    eos_token='<eos>',
    unk_token='<unk>',
    chat_template=TEMPLATE,
  )
  tokenizer.save_pretrained(path)
  return HuggingFaceTokenizer(str(path))


class FakeEmbedder:
  """A vector of a text: how often it has 'a', 'b', 'c'; of unit length."""

  name, dimensions = 'vectors', 3

  def encode(self, texts, truncate=False):
    if any('long' in text for text in texts) and not truncate:
      raise ValueError('a text is too long')
    counts = [[text.count(c) for c in 'abc'] for text in texts]
    vectors = np.asarray(counts, np.float32)
    norms = np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return vectors / norms, sum(map(len, texts))


class Client:
  """Raw HTTP/1.1, so that nothing is mended on the way."""

  def __init__(self, port, key=None):
    self.port, self.key = port, key
    self.url = f'http://127.0.0.1:{port}'

  def connect(self):
    return http.client.HTTPConnection('127.0.0.1', self.port, timeout=TIMEOUT)

  def send(self, method, path, body=None, **headers):
    """(status, headers, bytes)."""
    connection = self.connect()
    try:
      self.begin(connection, method, path, body, **headers)
      answer = connection.getresponse()
      return answer.status, answer.headers, answer.read()
    finally:
      connection.close()

  def begin(self, connection, method, path, body=None, **headers):
    headers = {k.replace('_', '-'): v for k, v in headers.items()}
    if isinstance(body, (dict, list)):
      body = json.dumps(body).encode()
    if body is not None:
      headers.setdefault('Content-Type', 'application/json')
    if self.key:
      headers.setdefault('Authorization', f'Bearer {self.key}')
    connection.request(method, path, body, headers)

  def get(self, path, **headers):
    status, _, body = self.send('GET', path, **headers)
    return status, json.loads(body)

  def post(self, path, body, **headers):
    status, _, body = self.send('POST', path, body, **headers)
    return status, json.loads(body)

  def chat(self, content='hello', **fields):
    messages = [{'role': 'user', 'content': content}]
    body = {'model': 'base', 'messages': messages, **fields}
    return self.post('/v1/chat/completions', body)

  def complete(self, prompt='hello', **fields):
    body = {'model': 'base', 'prompt': prompt, **fields}
    return self.post('/v1/completions', body)

  def events(self, path, body):
    """The events of a stream, and whether it ended with [DONE]."""
    status, headers, raw = self.send('POST', path, body)
    assert status == 200, raw
    assert headers['content-type'].startswith('text/event-stream')
    events = [line for line in raw.decode().split('\n\n') if line]
    assert all(line.startswith('data: ') for line in events)
    events = [line.removeprefix('data: ') for line in events]
    done = events[-1] == '[DONE]'
    return [json.loads(line) for line in events[: len(events) - done]], done


def service(engine, words, **fields):
  """A service of the base 'base'."""
  return Service(
    engine,
    ServedTokenizer(words, engine.decoder_only, (END,)),
    ModelRegistry(engine, 'base', 'sha of base', ChatSettings()),
    Metrics(engine),
    **fields,
  )


@contextlib.contextmanager
def running(service, started=True, seconds=5.0, connections=DEFAULT_LIMITS):
  """A client of a service that is served; `client.server` ends it."""
  sock = listen('127.0.0.1', 0)
  client = Client(sock.getsockname()[1])
  client.service, client.engine = service, service.engine
  client.server = Server(service, seconds, connections)

  def start():
    if started:
      service.engine.start(lambda *_: None)

  thread = threading.Thread(
    target=serve, args=(client.server, sock, start), daemon=True
  )
  thread.start()
  client.thread = thread
  wait_until(lambda: client.server.started)
  wait_until(lambda: service.engine.ready or not started)
  try:
    yield client
  finally:
    client.server.should_exit = client.server.force_exit = True
    thread.join(TIMEOUT)
    service.engine.stop()
    service.tokenizer.close()
    assert not thread.is_alive()


def wait_until(holds, seconds=10):
  until = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < until
    time.sleep(0.005)


def fake(words=None, **fields):
  """A service of a fake engine and bytes."""
  return service(FakeEngine(), words or ByteTokenizer(), **fields)


def constrained(service, words):
  """A service that can force JSON and calls of tools."""
  pytest.importorskip('llguidance')
  constraints = pytest.importorskip('moepeft.inference.constraints.grammar')
  from moepeft.serve.http.tool_calls import ToolPlanner

  service.compiler = constraints.Compiler(words, service.engine.vocab, (END,))
  service.tool_planner = ToolPlanner(service.compiler)
  return service


def port_is_open(port):
  with contextlib.suppress(OSError):
    socket.create_connection(('127.0.0.1', port), 1).close()
    return True
  return False
